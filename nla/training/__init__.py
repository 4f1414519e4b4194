"""A training loop that resumes after a crash, gives the same bits each time, and can run in several processes."""
