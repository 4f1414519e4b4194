"""A training loop that is exact to the bit, goes on after a crash, and may be shared by several processes."""
