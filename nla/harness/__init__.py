"""The books of a run: what was asked, what it will cost, what came out, and where it is shown."""
