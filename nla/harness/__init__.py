"""The request of a run, its estimated cost, its record, and its output to the terminal and to trackers."""
