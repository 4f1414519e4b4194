"""Adaptive nonlinear low-rank compression (NLA) of large models, and the baselines it is measured against."""
