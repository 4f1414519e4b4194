"""The cache on disk, errors, threads, peak memory, and digests of code and packages."""
