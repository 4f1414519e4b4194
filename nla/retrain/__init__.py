"""Retraining: trains the triplets (A, B, mu) of a compressed model, and other parameters, on the model's loss."""
