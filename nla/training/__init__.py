"""A training loop that resumes after a crash, is reproducible to the bit, and can run in several processes."""
