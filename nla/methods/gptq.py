"""GPTQ: quantisation with error feedback (Frantar et al., 2023)."""

from nla.codes.feedback import gptq
from nla.codes.grid_format import GridFormat
from nla.codes.rounding import Rounded
from nla.matrix.objective import Norms, Objective
from nla.methods.grid_method import GridMethod
from nla.methods.rounding import hessian
from nla.terms.base import Term


class GPTQ(GridMethod):
    """Inputs are rounded one after another; those that follow make up for the error in the layer's outputs.

    Args:
        sequential: each layer is rounded for inputs that passed through the compressed earlier layers.
    """

    needs = frozenset({"gram"})

    def __init__(self, sequential: bool) -> None:
        self.sequential = sequential

    def objective(self, norms: Norms) -> Objective:
        return norms.outputs

    def rounded(self, objective: Objective, form: GridFormat) -> Rounded:
        return gptq(objective.weight, hessian(objective), form)

    def start_flops(self, term: Term) -> int:
        return super().start_flops(term) + gptq_flops(term.out_features, term.in_features)


def gptq_flops(out_features: int, in_features: int) -> int:
    """Floating-point operations: two orders of inputs, feedback in three passes, and the errors of four roundings."""
    return 8 * in_features**3 // 3 + (3 + 8) * out_features * in_features**2
