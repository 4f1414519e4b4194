"""PELA: a low-rank start for retraining (Guo et al., 2023)."""

from nla.methods.svd import SVD


class PELA(SVD):
    """The conversion of PELA, which is truncated SVD. The paper's rank, mn / (1.5 (m + n)), is ratio=0.332, as mu counts too.

    PELA's feature distillation and weight perturbation are losses of retraining (conf/retrain/pela.yaml).
    """
