"""PELA: low-rank start for retraining (Guo et al., 2023)."""

from nla.methods.svd import SVD


class PELA(SVD):
    """The conversion of PELA is truncated SVD, at rank mn / (1.5 (m + n)) in the paper: ratio=0.3333.

    What sets it apart, feature distillation and weight perturbation, are losses of retraining.
    """
