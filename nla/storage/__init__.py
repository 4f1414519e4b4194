"""How the numbers of terms are stored in few bits: packed codes, grids with scales, angles, lattices."""
