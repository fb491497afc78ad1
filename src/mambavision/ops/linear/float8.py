"""Linear layer of 8-bit numbers, with what follows it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambavision.ops.activation import Activation, activate, check_activation
from mambavision.ops.backend import Backend, check_shapes, select, situation_of
from mambavision.ops.float8 import refuse_float8_kernels, to_float8
from mambavision.ops.precision import FLOAT8, HALVES

UNIT = 16  # of which the library takes multiples, rows and columns of the weight


def _gpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    one: Tensor,
    bias: Tensor | None,
    activation: Activation,
    dtype: torch.dtype,
) -> Tensor:
    from mambavision.ops.linear.gpu_op import linear_float8

    y: Tensor = linear_float8(x, weight, scale, one, bias, activation, dtype)
    return y


def linear_float8_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    one: Tensor,
    bias: Tensor | None,
    activation: Activation,
    dtype: torch.dtype,
) -> Tensor:
    """The same in float32, or in float64 where the scale is; arguments and result as in `linear_float8`."""
    y = F.linear(x.to(scale.dtype), weight.to(scale.dtype)) * (scale * one)
    y = activate(y if bias is None else y + bias, activation)
    return to_float8(y, backend="reference") if dtype == FLOAT8 else y.to(dtype)


BACKENDS = (
    Backend("gpu", _gpu, "the library's product, or the kernel for Hopper GPUs", refuse_float8_kernels),
    Backend("reference", linear_float8_reference, "plain PyTorch, runs everywhere", lambda _: None),
)


def linear_float8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    one: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    activation: Activation = "none",
    backend: str = "auto",
) -> Tensor:
    """act(x weight^T scale + bias), for inference.

    Summed as the GPU's 8-bit products are, those of the Hopper generation with some 14 bits; the reference in float32.

    Args:
        x: float8_e4m3fn, (rows, inner).
        weight: float8_e4m3fn, (columns, inner); both multiples of 16.
        scale: (columns,), float32: the same number for all columns, as `scaled_to_float8(..., together=True)` gives.
        one: (1,), float32, 1: the scale of x, which the library wants, too. Kept with the weight, since made here it
            could be made inside a recording.
        bias: (columns,) or None; fastest in `dtype`, or in float32 where that has 8 bits.
        dtype: of the result: float8_e4m3fn, bfloat16 or float16.
        activation: `none`, `relu`, `gelu` or `gelu_tanh`.
        backend: `auto`, or the name of one of `BACKENDS`.

    Returns:
        (rows, columns).

    Raises:
        TypeError: x, weight or the result are to be of another type.
        ValueError: shapes do not fit, or no such activation.
        RuntimeError: the requested backend cannot run here.
    """
    check_activation(activation)
    if x.dtype != FLOAT8 or weight.dtype != FLOAT8:
        raise TypeError(f"x and weight must be float8_e4m3fn, got {x.dtype} and {weight.dtype}.")
    if dtype not in (FLOAT8, *HALVES):
        raise TypeError(f"dtype must be float8_e4m3fn, bfloat16 or float16, got {dtype}.")
    columns, inner = weight.shape
    check_shapes(x=(x, (x.shape[0], inner)), scale=(scale, (columns,)), one=(one, (1,)), bias=(bias, (columns,)))
    if columns % UNIT or inner % UNIT:
        raise ValueError(f"weight must have multiples of {UNIT} rows and columns, got {tuple(weight.shape)}.")
    choice = select("linear_float8", BACKENDS, situation_of(x, scale, bias), backend)
    return choice.backend.function(x, weight, scale, one, bias, activation, dtype)


__all__ = ["BACKENDS", "UNIT", "linear_float8", "linear_float8_reference"]
