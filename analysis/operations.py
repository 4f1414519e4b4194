"""The operations of a forward pass, from the terms that a record names."""

from collections.abc import Iterable

from nla.harness.record import FitRecord
from nla.kernels.harmonic import Harmonic
from nla.kernels.linear import Linear
from nla.kernels.phase import Phase
from nla.kernels.piecewise import Piecewise

# Kernels whose products have their rank, which does not depend on their settings.
KERNELS = {kernel.name: kernel for kernel in (Linear(), Piecewise(), Phase(), Harmonic(order=2, weight=1.0))}
DENSE = ("int", "nf4", "e8")  # how names of terms begin whose matrix is multiplied as a whole


def operations_to_dense(fits: Iterable[FitRecord]) -> float | None:
    """Multiplications of the compressed matrices for one token, in thin products, relative to those of the dense ones.

    Scales, rotations and what is added to the products are not counted; nor are cosines, which are computed once. None if a
    kernel has no thin product.
    """
    done, dense = 0.0, 0
    for fit in fits:
        m, n = fit.shape
        widths = [width(term.split(), m, n) for term in fit.terms.split(" + ")]
        if None in widths:
            return None
        done += sum(known * (m + n) for known in widths if known is not None)
        dense += m * n
    return done / dense


def width(words: list[str], m: int, n: int) -> float | None:
    """The rank k of a term whose products with one token take (m + n) k multiplications; None if it is computed by tiles."""
    name, numbers = words[0], dict(word.split("=") for word in words[1:] if "=" in word)
    if name.startswith(DENSE):
        return m * n / (m + n)
    if name == "factors":
        return int(numbers["rank"])
    kernel = KERNELS.get(name)
    return None if kernel is None else kernel.rank_bound(int(numbers["h"]), int(numbers["r"]))
