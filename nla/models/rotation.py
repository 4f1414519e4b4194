"""A random change of basis of the residual stream, folded into the weights: other weights, the same function.

The residual stream is the vector x (hidden,) of each token that every block reads and adds to. With an orthogonal matrix H
(hidden, hidden), the new model's stream is x H. RMSNorm divides by the length of x, which H does not change, once the norm's
gain is part of the layers that read the norm's output. Every matrix of a block reads or writes the stream, so each loses the
grid that a quantised file left in it.

Source: SliceGPT (arXiv 2401.15024), section 3, "computational invariance"; QuaRot (arXiv 2404.00456) rotates so to quantise.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

ROTATABLE = ("llama", "mistral", "qwen2")  # values of `model_type` with the modules that rotate() names, and with RMSNorm


def random_basis(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix (size, size) in float64, from the uniform (Haar) distribution.

    The signs make it so: the diagonal of R in QR is positive.
    """
    gaussian = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


@torch.no_grad()
def rotate(module: Any, basis: Tensor) -> None:
    """Rotate a transformers model of a type in ROTATABLE, in place. Products are computed in float64.

    Tied embeddings are untied, because the last norm's gain goes into the head alone.

    Args:
        module: the causal language model.
        basis: H, orthogonal, (hidden, hidden), float64.
    """
    stream = module.model
    fold(stream.norm, [module.lm_head], basis)
    module.config.tie_word_embeddings = False
    read(stream.embed_tokens, torch.ones(len(basis)), basis)  # its rows are the first x
    for block in stream.layers:
        attention, mlp = block.self_attn, block.mlp
        fold(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], basis)
        fold(block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], basis)
        write(attention.o_proj, basis)
        write(mlp.down_proj, basis)


def fold(norm: Any, readers: Iterable[Any], basis: Tensor) -> None:
    """Move the gain of a norm into all layers that read its output, and rotate what they read."""
    for layer in readers:
        read(layer, norm.weight, basis)
    norm.weight.fill_(1)


def read(layer: Any, gain: Tensor, basis: Tensor) -> None:
    """W (out, hidden) -> W diag(gain) H, as a new parameter. Its bias is not of the stream."""
    weight = layer.weight
    layer.weight = nn.Parameter(((weight.double() * gain.double()) @ basis).to(weight.dtype))


def write(layer: nn.Linear, basis: Tensor) -> None:
    """W (hidden, in) -> H^T W, and the bias b (hidden,) -> b H."""
    layer.weight.copy_(basis.T @ layer.weight.double())
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double() @ basis)
