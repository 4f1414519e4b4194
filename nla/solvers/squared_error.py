"""The squared error of a sum of kernel terms, and its gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nla.kernels.base import Kernel
from nla.kernels.factored import FactoredKernel
from nla.kernels.tiled import add_gradient, matrix_rows, panels
from nla.matrix.objective import Objective
from nla.matrix.triplets import Triplets


def squared_error(
    kernels: Sequence[Kernel], triplets: Sequence[Triplets], objective: Objective, products: torch.dtype
) -> tuple[Tensor, list[Triplets]]:
    """||(W' - W) S||^2, where W' is the sum of the kernels' matrices, and its gradient with respect to each A, B and mu.

    Args:
        products: the type in which the large matrix products of factored kernels are computed.
    """
    if all(isinstance(kernel, FactoredKernel) for kernel in kernels):
        return of_factors(kernels, triplets, objective, products)
    return of_tiles(kernels, triplets, objective)


@torch.no_grad()
def squared_error_alone(
    kernels: Sequence[Kernel], triplets: Sequence[Triplets], objective: Objective, products: torch.dtype = torch.float32
) -> Tensor:
    """The squared error without its gradient, which takes most of the operations. Arguments as in `squared_error`."""
    pairs = list(zip(kernels, triplets, strict=True))
    thin = [pair for pair in pairs if isinstance(pair[0], FactoredKernel)]
    tiled = [pair for pair in pairs if not isinstance(pair[0], FactoredKernel)]
    factors = joined_factors(*zip(*thin, strict=True)) if thin else None
    if factors and not tiled:
        return squared_norm(difference(*factors, objective, products)[0])
    loss = objective.weight.new_zeros(())
    for panel in panels(tiled[0][1]):
        loss += objective.squared(rows_of_sum(tiled, factors, panel) - objective.weight[panel])[0]
    return loss


def of_factors(
    kernels: Sequence[Kernel], triplets: Sequence[Triplets], objective: Objective, products: torch.dtype
) -> tuple[Tensor, list[Triplets]]:
    """||(W' - W) S||^2 and its gradients, where W' is the sum of kernels that all have thin factors."""
    # Three thin products take 6 * out * in * k operations: E = L (S^T R)^T - W S, dL = 2 E S^T R, dR = 2 S E^T L. A weighted
    # norm adds two products with S, 4 * in^2 * k. Autograd does only the elementwise part, from triplets to L and R.
    triplets = [t.map(lambda p: p.detach().requires_grad_()) for t in triplets]
    with torch.enable_grad():
        left, right = joined_factors(kernels, triplets)
    loss, d_left, d_right = of_product(left, right, objective, products)
    return loss, gradients(triplets, (left, right), (d_left, d_right))


@torch.no_grad()
def of_product(
    left: Tensor, right: Tensor, objective: Objective, products: torch.dtype, back: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """||(L R^T - W) S||^2, and its gradients with respect to L (out, k) and R (in, k).

    Args:
        back: takes the place of S in the gradient with respect to R, see `Objective.preconditioned`; in the type `products`.
    """
    error, low_left, low_right = difference(left, right, objective, products)
    d_left = (error @ low_right).to(left.dtype).mul_(2)
    d_right = error.T @ low_left  # of S^T R
    d_right = objective.weigh_back(d_right) if back is None else back @ d_right
    d_right = d_right.to(left.dtype).mul_(2)
    return squared_norm(error), d_left, d_right


def difference(left: Tensor, right: Tensor, objective: Objective, products: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(L R^T - W) S (out, in), L (out, k), and S^T R (in, k), in the type `products`."""
    left, right = left.to(products), objective.weigh(right.to(products))
    return torch.addmm(objective.target.to(products), left, right.T, beta=-1), left, right


@torch.no_grad()
def of_tiles(kernels: Sequence[Kernel], triplets: Sequence[Triplets], objective: Objective) -> tuple[Tensor, list[Triplets]]:
    """||(W' - W) S||^2 and its gradients, panel by panel of rows of W', for any kernels."""
    thin = [i for i, kernel in enumerate(kernels) if isinstance(kernel, FactoredKernel)]
    tiled = [i for i in range(len(kernels)) if i not in thin]
    found = {i: triplets[i].map(torch.zeros_like) for i in tiled}
    loss, factors = objective.weight.new_zeros(()), None
    if thin:
        leaves = [triplets[i].map(lambda p: p.detach().requires_grad_()) for i in thin]
        with torch.enable_grad():
            factors = joined_factors([kernels[i] for i in thin], leaves)
        d_left, d_right = (torch.zeros_like(factor) for factor in factors)
    for panel in panels(triplets[tiled[0]]):
        rows = rows_of_sum([(kernels[i], triplets[i]) for i in tiled], factors, panel)
        part, d_panel = objective.squared(rows - objective.weight[panel])
        loss += part
        for i in tiled:
            add_gradient(kernels[i], triplets[i], panel, d_panel, found[i])
        if factors:
            left, right = factors
            d_left[panel] = d_panel @ right
            d_right.addmm_(d_panel.T, left[panel])
    if factors:
        found |= dict(zip(thin, gradients(leaves, factors, (d_left, d_right)), strict=True))
    return loss, [found[i] for i in range(len(kernels))]


def rows_of_sum(tiled: Sequence[tuple[Kernel, Triplets]], factors: tuple[Tensor, Tensor] | None, panel: slice) -> Tensor:
    """The rows (rows, in) of the sum of the matrices of some kernels and of the product of two factors."""
    rows = matrix_rows(*tiled[0], panel)
    for kernel, t in tiled[1:]:
        rows = rows + matrix_rows(kernel, t, panel)
    return rows if factors is None else torch.addmm(rows, factors[0][panel], factors[1].T)


def squared_norm(matrix: Tensor) -> Tensor:
    """||M||^2, added up in fp32 or wider."""
    return torch.linalg.vector_norm(matrix, dtype=torch.promote_types(matrix.dtype, torch.float32)).square()


def joined_factors(kernels: Sequence[Kernel], triplets: Sequence[Triplets]) -> tuple[Tensor, Tensor]:
    """L (out, k) and R (in, k), whose product L R^T is the sum of the kernels' matrices."""
    factors = [kernel.factors(t) for kernel, t in zip(kernels, triplets, strict=True) if isinstance(kernel, FactoredKernel)]
    if len(factors) == 1:
        return factors[0]
    return torch.cat([left for left, _ in factors], 1), torch.cat([right for _, right in factors], 1)


def gradients(triplets: Sequence[Triplets], outputs: tuple[Tensor, Tensor], d_outputs: tuple[Tensor, Tensor]) -> list[Triplets]:
    """Gradients with respect to triplets, given the outputs computed from them and the gradients of these outputs."""
    found = torch.autograd.grad(outputs, [p for t in triplets for p in t.tensors], d_outputs)
    return [Triplets(*found[i : i + 3]) for i in range(0, len(found), 3)]
