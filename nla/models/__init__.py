"""Loaders of models. They do not depend on the code for compression."""
