"""GPTQ: rounding with error feedback. The error of each input is made up for by the inputs that are not rounded yet."""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from nla.codes.damped import damped, upper_factor
from nla.codes.grid_format import GridFormat
from nla.codes.rounding import Rounded, Scaling, best_scaling, nearest_codes, rounded_to_nearest
from nla.machine.peak_memory import unmeasured
from nla.matrix.parts import slices

BLOCK = 128  # inputs between two updates of all later ones


class Hessian:
    """The matrix G (in, in) of the weighted error e G e^T of a row e, fp64, and what error feedback needs of it, computed once.

    Attributes:
        importance: the diagonal (in,).
        order: the inputs by falling importance (in,).
        own: feedback() in the inputs' own order, fp32.
        ordered: feedback() in `order`, fp32.
    """

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram
        self.importance = gram.diagonal().clamp(min=0)

    @cached_property
    def order(self) -> Tensor:
        return self.importance.argsort(descending=True, stable=True)

    @cached_property
    def own(self) -> Tensor:
        return feedback(self.gram).float()

    @cached_property
    def ordered(self) -> Tensor:
        return feedback(self.gram[self.order][:, self.order]).float()

    def errors(self, error: Tensor) -> Tensor:
        """e G e^T for each row e of an error (out, in), fp32: (out,)"""
        return ((error @ self.gram.to(error)) * error).sum(1)


def gptq(weight: Tensor, hessian: Hessian, form: GridFormat) -> Rounded:
    """The rounding of a weight (out, in), fp32, with the smallest weighted error of four, chosen for each row.

    Source: Frantar et al., "GPTQ", ICLR 2023. Rows are independent, and no order is stored. Static groups have the scaling
    of the original weight and take the inputs by importance or in their own order. Dynamic groups take them in their own
    order, and have the scaling of the weights that are left when they are reached. The fourth is RTN.
    """
    if not hessian.importance.any():
        return rounded_to_nearest(weight, form)
    nearest = rounded_to_nearest(weight, form, hessian.importance)
    own = torch.arange(weight.shape[1], device=weight.device)
    found = [
        nearest,
        static_groups(weight, form, nearest.scaling, hessian.order, hessian.ordered),
        static_groups(weight, form, nearest.scaling, own, hessian.own),
        dynamic_groups(weight, form, hessian),
    ]
    return best_rows(found, [hessian.errors(weight - rounded.dense(form)) for rounded in found])


def best_rows(found: list[Rounded], errors: list[Tensor]) -> Rounded:
    """Each row from the rounding with its smallest error; `errors` are (out,) each."""
    best = torch.stack(errors).argmin(0)
    rows = torch.arange(len(best), device=best.device)
    codes, scales, zeros = (
        torch.stack(parts)[best, rows]
        for parts in zip(*((r.codes, r.scaling.scales, r.scaling.zeros) for r in found), strict=True)
    )
    return Rounded(codes, Scaling(scales, zeros))


def static_groups(weight: Tensor, form: GridFormat, scaling: Scaling, order: Tensor, U: Tensor) -> Rounded:
    """Error feedback with this scaling; the inputs are rounded in this order (in,). U: of feedback() in this order, fp32."""
    scales, zeros = (part.T.contiguous() for part in scaling.of_inputs(order, form.group))
    left = weight.T[order].contiguous()
    codes = torch.empty_like(left)
    for block in slices(len(left), BLOCK):
        codes[block] = rounded_block(left, block, U, scales[block], zeros[block], form)
    return Rounded(codes[order.argsort()].T.contiguous(), scaling)


def dynamic_groups(weight: Tensor, form: GridFormat, hessian: Hessian) -> Rounded:
    """Error feedback in the order of the inputs, with the best scaling of each group when it is reached."""
    left = weight.T.contiguous()
    codes, scalings = torch.empty_like(left), []
    for block in blocks(len(left), form.group):
        if block.start % form.group == 0:  # never inside a block, so that all weights of the group are up to date
            group = slice(block.start, block.start + form.group)
            counts = hessian.importance[group]
            scalings.append(best_scaling(left[group].T.contiguous(), form, counts if counts.any() else None))
        scales, zeros = (part.T.expand(block.stop - block.start, -1) for part in scalings[-1])
        codes[block] = rounded_block(left, block, hessian.own, scales, zeros, form)
    return Rounded(codes.T.contiguous(), Scaling(*(torch.cat(part, 1) for part in zip(*scalings, strict=True))))


def blocks(n: int, group: int) -> Iterator[slice]:
    """Slices of at most BLOCK inputs that cover range(n) and end where a group ends."""
    for begin in range(0, n, group):
        end = min(begin + group, n)
        for start in range(begin, end, BLOCK):
            yield slice(start, min(start + BLOCK, end))


def rounded_block(left: Tensor, block: slice, U: Tensor, scales: Tensor, zeros: Tensor, form: GridFormat) -> Tensor:
    """Codes (k, out) of the inputs of a block. The errors are passed on to all later inputs, in place.

    Args:
        left: weights with all feedback so far, (in, out), fp32.
        U: of feedback(), fp32.
        scales, zeros: of the inputs of the block, (k, out).
    """
    codes, passed = torch.empty_like(left[block]), torch.empty_like(left[block])
    with unmeasured():
        for i, j in enumerate(range(block.start, block.stop)):
            codes[i] = nearest_codes(left[j], Scaling(scales[i], zeros[i]), form)
            passed[i] = (left[j] - scales[i] * form.levels.values(codes[i], zeros[i])) / U[j, j]
            left[j + 1 : block.stop].addr_(U[j, j + 1 : block.stop], passed[i], alpha=-1)
    left[block.stop :].addmm_(U[block, block.stop :].T, passed, alpha=-1)
    return codes


def feedback(gram: Tensor) -> Tensor:
    """U, upper triangular, with U^T U = the inverse of the damped G (in, in), fp64.

    The damped G is R R^T with R upper triangular, so that U = R^-1.
    """
    R = upper_factor(damped(gram))
    return torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
