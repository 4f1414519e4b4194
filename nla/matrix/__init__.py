"""One weight matrix: its triplets, its spectrum, what is known of its inputs, and the norm that a fit minimises."""
