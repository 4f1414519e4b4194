"""Compressed models as folders: saving, loading, the model card, and conversion to other folders."""
