"""Statistics of the inputs of one linear layer, measured on calibration data."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Statistics of the inputs x of one linear layer. A statistic that was not collected is None.

    Behind compressed blocks, x differs from the input z that the layer has in the dense model for the same token.

    Attributes:
        gram: Gram matrix, the sum over tokens of x x^T, (in, in), accumulated in fp32 (SVD-LLM).
        magnitude: mean over tokens of |x|, (in,) (ASVD).
        fisher: Fisher information, the sum over outputs of the mean squared gradient of the weight, (in,) (FWSVD).
        cross: sum over tokens of z x^T, (in, in), accumulated in fp32 (AA-SVD).
    """

    gram: Tensor | None = None
    magnitude: Tensor | None = None
    fisher: Tensor | None = None
    cross: Tensor | None = None
