"""QuIP#: quantisation to points of the lattice E8, after random rotations of outputs and inputs (Tseng et al., 2024)."""

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from nla.codes.block_ldlq import MULTIPLES, SWEEPS, block_ldlq
from nla.codes.hadamard import rotated, rotation_flops
from nla.codes.lattice_format import BLOCK, WIDTHS, RowFormat, blocks
from nla.matrix.objective import Norms, Objective
from nla.methods.base import Shape
from nla.methods.rounding import Rounding
from nla.solvers.base import Start
from nla.terms.base import Term
from nla.terms.kernel_term import nothing
from nla.terms.lattice_term import LatticeTerm, largest_size, lattice_bits, rotations

SEARCH_FLOPS = 100  # operations for each weight and scale of the search for the nearest lattice point


class QuIP(Rounding):
    """The weight in 1 to 4 bits, the most that fit, rounded in the norm of the layer's outputs. Without fine-tuning.

    The paper has whole numbers of bits. Between them, the vectors that are rounded last take one bit more than the others: no
    later vector can make up for their errors.

    Args:
        sequential: each layer is rounded for inputs that passed through the compressed earlier layers.
    """

    needs = frozenset({"gram"})

    def __init__(self, sequential: bool) -> None:
        self.sequential = sequential

    def objective(self, norms: Norms) -> Objective:
        return norms.outputs

    def plan_matrix(self, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> Term:
        size = largest_size(out_features, in_features, bits, dtype)
        return LatticeTerm.empty(out_features, in_features, size, dtype) if size else nothing(out_features, in_features, dtype)

    def least_bits(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        return sum(lattice_bits(m, blocks(n) * min(WIDTHS), dtype) for m, n in shapes)

    def start(self, objective: Objective, planned: Term, generator: torch.Generator) -> Start:
        assert isinstance(planned, LatticeTerm) and objective.wide_root is not None
        weight, filling = objective.weight, planned.filling
        m, n = weight.shape
        seed = torch.randint(2**62, (), generator=generator)
        left, right = rotations(int(seed), m, n, weight.device)
        W = rotated(rotated(pad(weight, (0, filling)), right).T, left).T.contiguous()  # U W V^T
        root = rotated(pad(objective.wide_root.T, (0, filling)), right)  # (V S)^T
        rounded = block_ldlq(W, root.T @ root, RowFormat(blocks(n), planned.size))
        scale = torch.tensor(rounded.scale, dtype=weight.dtype, device=weight.device)
        return Start(LatticeTerm(rounded.codes, scale, seed.to(weight.device), n))

    def start_flops(self, term: Term) -> int:
        m, n = term.out_features, BLOCK * blocks(term.in_features)
        rotate = (m + n) * rotation_flops(n) + n * rotation_flops(m)
        each = m * n * (SEARCH_FLOPS + 3 * n)  # search, feedback and error
        return rotate + 3 * n**3 + (len(MULTIPLES) + SWEEPS) * each
