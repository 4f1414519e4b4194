"""Codes of 1 to 8 bits, packed without gaps into bytes."""

from functools import cache

import torch
from torch import Tensor

WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}  # types of as many bytes as a byte has codes of these bits


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, n) in 0 .. 2^bits - 1, of any integer type, as uint8 (rows, packed_width(n, bits)).

    Eight codes take `bits` bytes: byte k has bits 8k .. 8k + 7 of the number sum_i codes[i] << (bits * i). A row is filled up
    to a multiple of eight codes.
    """
    rows, n = codes.shape
    filled = torch.nn.functional.pad(codes.to(torch.int64), (0, -n % 8)).view(rows, -(-n // 8), 8)
    words = (filled << (bits * torch.arange(8, device=codes.device))).sum(-1, keepdim=True)  # 64 bits at most
    return ((words >> (8 * torch.arange(bits, device=codes.device))) & 255).to(torch.uint8).flatten(1)


def unpacked(packed_codes: Tensor, bits: int, n: int) -> Tensor:
    """The first n codes of each row of `packed`: uint8 (rows, packed_width(n, bits)) -> uint8 (rows, n)."""
    if bits == 8:
        return packed_codes[:, :n]
    if bits in WORDS:
        found = words(bits, packed_codes.device).index_select(0, packed_codes.flatten().int())
        return found.view(torch.uint8).view(len(packed_codes), packed_codes.shape[1] * (8 // bits))[:, :n]
    groups = packed_codes.view(len(packed_codes), packed_codes.shape[1] // bits, bits)
    codes = []
    for i in range(8):  # code i is in byte (bits * i) // 8 and perhaps the next one
        byte, shift = divmod(bits * i, 8)
        code = groups[:, :, byte] >> shift
        if shift + bits > 8:
            code = code | groups[:, :, byte + 1] << (8 - shift)
        codes.append(code & (2**bits - 1))
    return torch.stack(codes, -1).flatten(1)[:, :n]


@cache
def words(bits: int, device: torch.device) -> Tensor:
    """The codes in each byte 0 .. 255, one byte for each code, as one integer: (256,). One look-up finds all of them."""
    byte, place = torch.arange(256, device="cpu")[:, None], torch.arange(8 // bits, device="cpu")
    return (byte >> bits * place & (2**bits - 1)).to(torch.uint8).view(WORDS[bits]).flatten().to(device)


def packed_width(n: int, bits: int) -> int:
    """Bytes of a row of n packed codes."""
    return -(-n // 8) * bits
