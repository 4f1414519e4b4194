"""Solvers: gradient descent that fits triplets to a weight matrix, from a random start or a warm start."""
