"""Multi-head attention of the tokens of each window to each other, from the joint projection of q, k and v."""

from __future__ import annotations

import torch
from torch import Tensor

from mambavision.ops.backend import Backend, Situation, refuse_16_bit_kernels, select
from mambavision.ops.window_attention.reference import TRAINING_BACKENDS, window_attention_sdpa

# Tokens and width of a head up to which the kernels were measured to be the fastest, forward and backward; and the same
# without gradients, where of many longer windows cuDNN's is as fast.
MOST_TOKENS, WIDEST_HEAD = 256, 64
SHORT_WINDOW, WIDEST_SHORT_HEAD = 64, 128


def _triton(qkv: Tensor, num_heads: int, dropout: float, scale: float) -> Tensor:  # noqa: ARG001  (refused beforehand)
    from mambavision.ops.window_attention.triton_op import window_attention

    y, _ = window_attention(qkv, num_heads, scale)
    assert isinstance(y, Tensor)
    return y


def _refuse_triton(situation: Situation) -> str | None:
    if fault := refuse_16_bit_kernels(situation):
        return fault
    if situation.length > MOST_TOKENS:
        return f"its kernels are for windows of at most {MOST_TOKENS} tokens, not {situation.length}"
    short = situation.length <= SHORT_WINDOW and not situation.differentiated
    widest = WIDEST_SHORT_HEAD if short else WIDEST_HEAD
    if situation.width > widest:
        return f"its kernels are for heads of at most {widest} channels, not {situation.width}"
    return "its kernels have no dropout" if situation.dropout else None


BACKENDS = (
    Backend("triton", _triton, "GPU kernels that read the projection as it is", _refuse_triton),
    Backend("sdpa", window_attention_sdpa, "PyTorch's, runs and exports everywhere", lambda _: None),
)


def window_attention(
    qkv: Tensor, *, num_heads: int, dropout: float = 0.0, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """softmax(scale Q K^T) V, head by head (paper, equation 8).

    Args:
        qkv: (windows, length, 3 x channels): queries, keys and values, each head by head.
        num_heads: heads, which divide the channels into parts of one width.
        dropout: probability that a weight is dropped; the others are scaled up.
        scale: of the scores; by default 1 / sqrt(width).
        backend: `auto`, or the name of one of `BACKENDS`.

    Returns:
        (windows, length, channels) in the type of qkv.

    Raises:
        ValueError: the heads do not divide the channels.
        RuntimeError: the requested backend cannot run here.
    """
    if qkv.dim() != 3 or qkv.shape[2] % (3 * num_heads) != 0:
        raise ValueError(f"qkv must be (windows, length, 3 x {num_heads} x width), got {tuple(qkv.shape)}.")
    width = qkv.shape[2] // (3 * num_heads)
    differentiated = torch.is_grad_enabled() and qkv.requires_grad
    situation = Situation(
        qkv.device.type, qkv.dtype, qkv.shape[1], width=width, dropout=dropout > 0, differentiated=differentiated
    )
    attend = select("window_attention", BACKENDS, situation, backend).backend.function
    return attend(qkv, num_heads, dropout, width**-0.5 if scale is None else scale)


__all__ = ["BACKENDS", "MOST_TOKENS", "SHORT_WINDOW", "TRAINING_BACKENDS", "window_attention"]
