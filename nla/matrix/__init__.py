"""One weight matrix: its triplets, its spectrum, statistics of its inputs, and the norm that a fit minimises."""
