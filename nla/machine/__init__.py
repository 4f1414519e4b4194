"""Disk, threads, memory and the code itself."""
