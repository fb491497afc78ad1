"""Depthwise convolution over the tokens of a window, with SiLU."""

from __future__ import annotations

from torch import Tensor

from mambavision.ops.backend import Backend, refuse_kernels, select, situation_of
from mambavision.ops.token_conv.reference import token_conv_reference


def _triton(x: Tensor, weight: Tensor) -> Tensor:
    from mambavision.ops.token_conv.triton_op import token_conv

    y: Tensor = token_conv(x, weight)
    return y


BACKENDS = (
    Backend("triton", _triton, "GPU kernels", refuse_kernels),
    Backend("reference", token_conv_reference, "plain PyTorch, runs and exports everywhere", lambda _: None),
)


def token_conv(x: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """SiLU of each channel's convolution with its own kernel, zeros beyond both ends (paper, equation 6).

    Args:
        x: (windows, length, channels); rows may be parts of wider ones.
        weight: (channels, kernel), kernel odd, of any floating type.
        backend: `auto`, or the name of one of `BACKENDS`.

    Returns:
        (windows, length, channels) in the type of x.

    Raises:
        ValueError: shapes do not fit.
        RuntimeError: the requested backend cannot run here.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] % 2 == 0:
        raise ValueError(f"weight must be ({x.shape[-1]}, odd) to fit x {tuple(x.shape)}, got {tuple(weight.shape)}.")
    return select("token_conv", BACKENDS, situation_of(x, weight), backend).backend.function(x, weight)


__all__ = ["BACKENDS", "token_conv"]
