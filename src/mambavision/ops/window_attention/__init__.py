"""Self-attention within windows of tokens, from the projection's output as it lies."""

from __future__ import annotations

from torch import Tensor

from mambavision.ops.backend import Backend, Situation, refuse_inference_kernels, select, situation_of
from mambavision.ops.window_attention.reference import window_attention_reference

MAX_LENGTH = 256  # the kernel holds all keys of a window at once


def _triton(qkv: Tensor, heads: int, scale: float) -> Tensor:
    from mambavision.ops.window_attention.triton_op import window_attention

    return window_attention(qkv, heads, scale)


def _refuse(situation: Situation) -> str | None:
    if situation.length > MAX_LENGTH:
        return f"its kernel is for windows of at most {MAX_LENGTH} tokens, not {situation.length}"
    return refuse_inference_kernels(situation)


BACKENDS = (
    Backend("triton", _triton, "GPU kernel", _refuse),
    Backend("reference", window_attention_reference, "PyTorch's own fused attention", lambda _: None),
)


def window_attention(qkv: Tensor, heads: int, *, scale: float, backend: str = "auto") -> Tensor:
    """softmax(scale Q K^T) V for each head and window, for inference (paper, equation 8).

    Args:
        qkv: (windows, length, 3 x heads x width): queries, keys and values, each head by head.
        heads: that divide a third of the channels.
        scale: of the scores.
        backend: `auto`, or the name of one of `BACKENDS`.

    Returns:
        (windows, length, heads x width), contiguous, in the type of qkv.

    Raises:
        ValueError: the channels do not divide into queries, keys and values of so many heads.
        RuntimeError: the requested backend cannot run here.
    """
    if qkv.dim() != 3 or qkv.shape[2] % (3 * heads):
        raise ValueError(f"qkv must be (windows, length, 3 x {heads} heads x width), got {tuple(qkv.shape)}.")
    situation = situation_of(qkv)._replace(length=qkv.shape[1])
    return select("window_attention", BACKENDS, situation, backend).backend.function(qkv, heads, scale)


__all__ = ["BACKENDS", "window_attention"]
