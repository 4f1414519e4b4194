"""Terms: what a compressed matrix is a sum of. One file per kind of term."""
