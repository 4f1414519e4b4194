"""Adaptive nonlinear low-rank compression (NLA) of large models, and the baselines with which it is compared."""
