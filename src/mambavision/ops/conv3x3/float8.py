"""3x3 convolution of 8-bit numbers, with what follows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mambavision.ops.activation import Activation, activate, check_activation
from mambavision.ops.backend import Backend, check_shapes, select, situation_of
from mambavision.ops.float8 import refuse_float8_kernels, to_float8

Result = tuple["Tensor | None", Tensor]


def _triton(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, activation: Activation
) -> Result:
    from mambavision.ops.conv3x3 import triton_op

    if residual is None:
        rounded: Tensor = triton_op.conv3x3_float8(x, weight, scale, bias, activation)
        return None, rounded
    both: tuple[Tensor, Tensor] = triton_op.conv3x3_float8_add(x, weight, scale, bias, residual, activation)
    return both


def conv3x3_float8_reference(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, activation: Activation
) -> Result:
    """The same in float32, or in float64 where scale and bias are; arguments and result as in `conv3x3_float8`."""
    y = F.conv2d(x.to(scale.dtype), weight.to(scale.dtype), None, 1, 1) * scale[:, None, None]
    y = activate(y + bias[:, None, None], activation)
    if residual is None:
        return None, to_float8(y, backend="reference")
    y = y + residual
    return y.to(residual.dtype), to_float8(y, backend="reference")


BACKENDS = (
    Backend("triton", cast("Callable[..., Tensor]", _triton), "GPU kernel", refuse_float8_kernels),
    Backend(
        "reference",
        cast("Callable[..., Tensor]", conv3x3_float8_reference),
        "plain PyTorch, runs everywhere",
        lambda _: None,
    ),
)


def conv3x3_float8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    activation: Activation = "none",
    backend: str = "auto",
) -> Result:
    """act(conv(x) scale + bias) + residual with padding 1, summed in float32, for inference.

    Args:
        x: map, float8_e4m3fn, (batch, channels, H, W); fastest channels-last, with a multiple of 32 channels.
        weight: float8_e4m3fn, (columns, channels, 3, 3); fastest as `weight_of_rows` gives it.
        scale: (columns,), float32.
        bias: (columns,), float32.
        residual: (batch, columns, H, W), any floating type, added last, or None.
        activation: `none`, `relu`, `gelu` or `gelu_tanh`.
        backend: `auto`, or the name of one of `BACKENDS`.

    Returns:
        With a residual the result in its type, else None; and the result in 8 bits. (batch, columns, H, W) each.

    Raises:
        TypeError: x or weight are of another type.
        ValueError: shapes do not fit, or no such activation.
        RuntimeError: the requested backend cannot run here.
    """
    if x.dtype != torch.float8_e4m3fn or weight.dtype != torch.float8_e4m3fn:
        raise TypeError(f"x and weight must be float8_e4m3fn, got {x.dtype} and {weight.dtype}.")
    if x.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(f"weight must be (columns, {x.shape[1]}, 3, 3) to fit the map, got {tuple(weight.shape)}.")
    check_activation(activation)
    columns, (batch, _, height, width) = weight.shape[0], x.shape
    check_shapes(
        scale=(scale, (columns,)), bias=(bias, (columns,)), residual=(residual, (batch, columns, height, width))
    )
    choice = select("conv3x3_float8", BACKENDS, situation_of(x, weight, bias, residual), backend)
    function = cast("Callable[..., Result]", choice.backend.function)
    return function(x, weight, scale, bias, residual, activation)
