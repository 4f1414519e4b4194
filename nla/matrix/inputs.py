"""What calibration data tells of the inputs of one linear layer."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Of one linear layer; what no method asked for is None.

    Attributes:
        gram: sum over tokens of x x^T, (in, in), accumulated in fp32 (SVD-LLM).
        magnitude: mean over tokens of |x|, (in,) (ASVD).
        fisher: sum over outputs of the mean squared gradient of the weight, (in,) (FWSVD).
    """

    gram: Tensor | None = None
    magnitude: Tensor | None = None
    fisher: Tensor | None = None
