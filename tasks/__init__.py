"""Tasks that measure a model, and their data sets."""
