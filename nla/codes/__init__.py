"""Codes of a few bits: packing, codebooks, grids, lattices, and rounding with error feedback."""
