"""Shares by marginal gain: the next rank goes where it lowers the model's expected loss most for each number it costs."""

import torch
from torch import Tensor

from nla.budget.base import Budget, ModelView, Target
from nla.budget.uniform import Uniform
from nla.machine.errors import UserError, require_positive
from nla.matrix.objective import Norms
from nla.matrix.triplets import triplet_size
from nla.models.select import LinearSpec


class MarginalGain(Budget):
    """Minimises the expected rise of the model's loss, summed over the matrices, for linear factors in the activation norm.

    A matrix of rank R leaves an output error of sum_{k > R} s_k^2, where s_k are the singular values of the whitened weight
    W L (L L^T is the Gram matrix of the inputs). To second order, an output error e raises the loss by (g . e)^2 / 2, where g
    is the gradient of the loss with respect to the output. With e in a random direction, that is in proportion to
    |g|^2 |e|^2 / out. |g|^2 comes from one backward pass (see `gradient_of_outputs`).

    Rank R + 1 lowers the sum by |g|^2 s_{R+1}^2 / out and costs out + in + 1 numbers. The gains of a matrix fall with R, so the
    best shares take the largest gains per number. (WeLore has one threshold for all matrices too, for normalised singular
    values of the plain weight.) The curves are those of linear factors; other kernels get the same shares.

    Args:
        emphasis: exponent of |g|^2 / out. 1 is the second-order estimate. Large errors in several matrices raise the loss by
            more than the sum of their estimates.
        least: fraction of its uniform share that every matrix keeps.

    Raises:
        UserError: an argument is out of range; it names the setting.
    """

    needs = frozenset({"gram", "fisher"})
    looks = True

    def __init__(self, emphasis: float, least: float) -> None:
        require_positive("budget.emphasis", emphasis)
        if not isinstance(least, int | float) or not 0 <= least <= 1:
            raise UserError(f"budget.least={least} must be a fraction, from 0 to 1")
        self.emphasis, self.least = emphasis, least

    def allocate(self, specs: list[LinearSpec], target: Target) -> dict[str, int]:
        """Uniform shares, used until the spectra are known."""
        return Uniform().allocate(specs, target)

    def look(self, specs: list[LinearSpec], target: Target, view: ModelView) -> dict[str, int]:
        gains, costs, owners = [], [], []
        for i, spec in enumerate(specs):
            cost = triplet_size(spec.out_features, spec.in_features, 1)
            found = gain_of_each_rank(view.norms(spec.name), self.emphasis)[: max(1, spec.n_params // cost)] / cost
            found[: max(1, int(self.least * target.kept * spec.n_params / cost))] = torch.inf  # every matrix keeps these
            gains.append(found)
            costs.append(torch.full_like(found, cost * target.width))
            owners.append(torch.full_like(found, i, dtype=torch.long))
        order = torch.cat(gains).sort(descending=True, stable=True).indices
        spent, owner = torch.cat(costs)[order], torch.cat(owners)[order]
        bought = spent.cumsum(0) <= target.bits * sum(spec.n_params for spec in specs)
        total = torch.zeros(len(specs), dtype=spent.dtype).scatter_add_(0, owner[bought], spent[bought])
        return {spec.name: int(bits) for spec, bits in zip(specs, total.tolist(), strict=True)}


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
