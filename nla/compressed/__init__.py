"""Compressed linear layers, and functions that put them into a model and count their parameters."""
