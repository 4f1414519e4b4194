"""The device that a run computes on, and the types of its numbers."""

import torch

from nla.machine.errors import UserError
from nla.machine.provenance import processor

PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # types of the settings `products`


def find_device(asked: str) -> str:
    """The torch device that `device=...` selects on this machine."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(asked).type
    except (RuntimeError, TypeError):
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise UserError(f"device={asked} is not known; allowed: auto, cpu, cuda, cuda:<number>")
    if kind == "cuda" and (torch.device(asked).index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={asked} is not there: torch sees {torch.cuda.device_count()} GPUs; use device=cpu")
    return asked


def has_fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 products are faster than fp32 ones here.

    They are with AMX (measured: 7 times as fast), with AVX-512 BF16 of AMD (Zen 5: 4 times), and from Ampere on with CUDA. With
    AVX-512 BF16 of Intel and without AMX they are half as fast (measured).
    """
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and "AMD" in processor())


def products_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Context in which the matrix products of a model in fp32 are computed in bfloat16, if `dtype` is.

    The parameters stay in fp32, and so do kernels in whose sums terms cancel (`nla.kernels.precision`).
    """
    return torch.autocast(device.type, torch.bfloat16, dtype == torch.bfloat16)


def type_name(tensor: torch.Tensor) -> str:
    """The name of a tensor's type, such as `bfloat16`."""
    return str(tensor.dtype).removeprefix("torch.")
