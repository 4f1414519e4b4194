"""Training of the terms of one block on the block's own outputs."""
