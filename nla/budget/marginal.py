"""Shares by marginal gain: the next rank goes where it lowers the model's expected loss most for each number it costs."""

from typing import NamedTuple

import torch
from torch import Tensor

from nla.budget.base import ModelView, Target
from nla.budget.measured import MeasuredBudget
from nla.machine.errors import UserError, require_positive
from nla.matrix.objective import Norms
from nla.matrix.triplets import triplet_size
from nla.models.select import LinearSpec


class Offer(NamedTuple):
    """What a matrix can get next: by how much that lowers the expected loss for each number it costs, and these numbers."""

    rate: float
    numbers: int


class MarginalGain(MeasuredBudget):
    """Minimises the expected rise of the model's loss, summed over the matrices, for linear factors in the activation norm.

    A matrix of rank R leaves an output error of sum_{k > R} s_k^2, where s_k are the singular values of the whitened weight
    W L (L L^T is the Gram matrix of the inputs). To second order, an output error e raises the loss by (g . e)^2 / 2, where g
    is the gradient of the loss with respect to the output. With e in a random direction, that is in proportion to
    |g|^2 |e|^2 / out. |g|^2 comes from one backward pass (see `gradient_of_outputs`).

    Rank R + 1 lowers the sum by |g|^2 s_{R+1}^2 / out and costs out + in + 1 numbers. A matrix of rank R can also become dense,
    which leaves no error and costs out * in - R (out + in + 1) numbers. What is offered for a matrix falls, so the best shares
    take the largest gains per number. (WeLore has one threshold for all matrices too, for normalised singular values of the
    plain weight.) The curves are those of linear factors; other kernels get the same shares.

    Args:
        emphasis: exponent of |g|^2 / out. 1 is the second-order estimate. Large errors in several matrices raise the loss by
            more than the sum of their estimates.
        least: fraction of its uniform share that every matrix keeps.

    Raises:
        UserError: an argument is out of range; it names the setting.
    """

    needs = frozenset({"gram", "fisher"})

    def __init__(self, emphasis: float, least: float) -> None:
        require_positive("budget.emphasis", emphasis)
        if not isinstance(least, int | float) or not 0 <= least <= 1:
            raise UserError(f"budget.least={least} must be a fraction, from 0 to 1")
        self.emphasis, self.least = emphasis, least

    def look(self, specs: list[LinearSpec], target: Target, view: ModelView) -> dict[str, int]:
        offered = {}
        for spec in specs:
            gains = gain_of_each_rank(view.norms(spec.name), self.emphasis)
            least = int(self.least * target.kept * spec.n_params)
            offered[spec.name] = offers(spec.out_features, spec.in_features, gains, least)
        total = int(target.bits * sum(spec.n_params for spec in specs)) // target.width
        bought, refused = buy({name: first for name, (first, _) in offered.items()}, total)
        # A matrix that cannot become dense takes single ranks instead. One that was refused a rank is refused all later ones,
        # which cost as much.
        more, _ = buy({name: offered[name][1] for name in refused}, total - sum(bought.values()))
        return {name: (numbers + more.get(name, 0)) * target.width for name, numbers in bought.items()}


def buy(offered: dict[str, list[Offer]], left: int) -> tuple[dict[str, int], list[str]]:
    """{matrix: numbers bought} from `left` numbers, the highest rates first, and the matrices with an offer that did not fit.

    Args:
        offered: the offers of each matrix in falling order. None is bought without those before it.
    """
    pairs = [(offer, name) for name, found in offered.items() for offer in found if offer.rate > 0]
    pairs.sort(key=lambda pair: -pair[0].rate)  # stable: the offers of a matrix stay in order
    bought, refused = dict.fromkeys(offered, 0), dict[str, None]()  # in the order of the matrices, unlike a set
    for offer, name in pairs:
        if name in refused or offer.numbers > left:
            refused[name] = None
            continue
        bought[name] += offer.numbers
        left -= offer.numbers
    return bought, list(refused)


def offers(out_features: int, in_features: int, gains: Tensor, least: int) -> tuple[list[Offer], list[Offer]]:
    """What a matrix can get, in falling order: one rank after the other, and then, in one step, all that makes it dense.

    The step to the dense matrix comes after the rank R from which it gains least for each number. So the points (numbers, loss)
    after each offer are the lower convex hull of those of all ranks and of the dense matrix.

    Returns:
        these offers, and the single ranks that can be had instead of the step to the dense matrix.

    Args:
        gains: of each rank (ranks,), as `gain_of_each_rank` gives them.
        least: numbers that the matrix gets in any case; these ranks have an infinite rate. It gets one rank at least.
    """
    dense, cost = out_features * in_features, triplet_size(out_features, in_features, 1)
    ranks, first = max(1, (dense - 1) // cost), max(1, least // cost)
    rates = gains[:ranks] / cost
    rates[:first] = torch.inf
    left = gains.sum() - gains.cumsum(0)[:ranks]  # after each rank
    further = dense - cost * torch.arange(1, len(left) + 1).to(left)
    if further[0] <= 0:
        return [Offer(torch.inf, cost)], []  # one rank takes as many numbers as the dense matrix
    last = max(first, int((left / further).argmin()) + 1)
    step = Offer(float(left[last - 1] / further[last - 1]), int(further[last - 1]))
    single = [Offer(rate, cost) for rate in rates.tolist()]
    return [*single[:last], step], single[last:]


def gain_of_each_rank(norms: Norms, emphasis: float) -> Tensor:
    """By how much each rank lowers the expected loss, up to a factor that all matrices share: (min(out, in),), fp64."""
    weight = (gradient_of_outputs(norms) / len(norms.weight)) ** emphasis
    return norms.outputs.spectrum.squares.cpu() * weight


def gradient_of_outputs(norms: Norms) -> float:
    """|g|^2, the squared gradient of the loss with respect to a layer's output for a token, up to a common factor.

    The Fisher information of input j is the sum over tokens of |g|^2 x_j^2, if the gradients of different tokens are
    independent. Its ratio to the sum of x_j^2 is |g|^2. The median over the inputs ignores those that a few tokens with
    enormous inputs dominate: these tokens have almost no gradient.
    """
    gram, fisher = norms.statistics.gram, norms.statistics.fisher
    assert gram is not None and fisher is not None
    sizes = gram.double().diagonal()
    return float((fisher.double() / sizes)[sizes > 0].median()) if bool((sizes > 0).any()) else 0.0
