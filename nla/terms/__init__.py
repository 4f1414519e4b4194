"""Terms: the summands of a compressed matrix. One file per kind of term."""
