"""Layer norm without scale and shift, with the sums before it, behind it and beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from mambavision.ops.backend import Backend, Situation, check_shapes, refuse_inference_kernels, select, situation_of
from mambavision.ops.float8 import refuse_float8_kernels
from mambavision.ops.layer_norm.reference import (
    layer_norm_and_sum_reference,
    layer_norm_of_sum_reference,
    layer_norm_reference,
)
from mambavision.ops.precision import FLOAT8

_REFERENCE = "plain PyTorch, runs and exports everywhere"


def _refuse(situation: Situation) -> str | None:
    fault = refuse_inference_kernels(situation)
    if fault is None and situation.result == FLOAT8:
        return refuse_float8_kernels(situation)
    return fault


def _triton(x: Tensor, offset: Tensor | None, eps: float, dtype: torch.dtype | None) -> Tensor:
    from mambavision.ops.layer_norm.triton_op import layer_norm

    y: Tensor = layer_norm(x, offset, eps, dtype)
    return y


BACKENDS = (
    Backend("triton", _triton, "GPU kernel", _refuse),
    Backend("reference", layer_norm_reference, _REFERENCE, lambda _: None),
)


def layer_norm(
    x: Tensor, offset: Tensor | None = None, *, eps: float, dtype: torch.dtype | None = None, backend: str = "auto"
) -> Tensor:
    """The norm of x + offset over the last dimension, for inference.

    Args:
        x: (..., channels).
        offset: (channels,), float32 or as wide as x, or None.
        eps: added to the variance.
        dtype: of the result, float8_e4m3fn among others; None for that of x.
        backend: `auto`, or the name of one of `BACKENDS`.

    Returns:
        (..., channels).

    Raises:
        ValueError: shapes do not fit.
        RuntimeError: the requested backend cannot run here.
    """
    check_shapes(offset=(offset, (x.shape[-1],)))
    return select("layer_norm", BACKENDS, situation_of(x, offset)._replace(result=dtype), backend).backend.function(
        x, offset, eps, dtype
    )


def _triton_and_sum(x: Tensor, shift: Tensor, eps: float, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    from mambavision.ops.layer_norm.triton_op import layer_norm_and_sum

    y, total = layer_norm_and_sum(x, shift, eps, dtype)
    return y, total


SUM_BACKENDS = (
    Backend("triton", _triton_and_sum, "GPU kernel", _refuse),
    Backend("reference", layer_norm_and_sum_reference, _REFERENCE, lambda _: None),
)


def layer_norm_and_sum(
    x: Tensor, shift: Tensor, *, eps: float, dtype: torch.dtype | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The norm of x over the last dimension, and x + shift, for inference.

    Args:
        x: (..., channels).
        shift: (channels,), of any floating type.
        eps: added to the variance.
        dtype: of the norm; None for that of x.
        backend: `auto`, or the name of one of `SUM_BACKENDS`.

    Returns:
        Both (..., channels), the sum in the type of x.

    Raises:
        ValueError: shapes do not fit.
        RuntimeError: the requested backend cannot run here.
    """
    check_shapes(shift=(shift, (x.shape[-1],)))
    choice = select("layer_norm_and_sum", SUM_BACKENDS, situation_of(x, shift)._replace(result=dtype), backend)
    return choice.backend.function(x, shift, eps, dtype)


def _triton_of_sum(x: Tensor, share: Tensor, offset: Tensor | None, eps: float, dtype: torch.dtype | None) -> Tensor:
    from mambavision.ops.layer_norm.triton_op import layer_norm_of_sum_

    y: Tensor = layer_norm_of_sum_(x, share, offset, eps, dtype)
    return y


IN_PLACE_BACKENDS = (
    Backend("triton", _triton_of_sum, "GPU kernel", _refuse),
    Backend("reference", layer_norm_of_sum_reference, _REFERENCE, lambda _: None),
)


def layer_norm_of_sum_(
    x: Tensor,
    share: Tensor,
    offset: Tensor | None = None,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add a share to x in place; returns the norm of x + offset over the last dimension, for inference.

    Args:
        x: (..., channels), without gaps; becomes the sum.
        share: of the shape and type of x.
        offset: (channels,), float32 or as wide as x, or None.
        eps: added to the variance.
        dtype: of the norm; None for that of x.
        backend: `auto`, or the name of one of `IN_PLACE_BACKENDS`.

    Returns:
        (..., channels).

    Raises:
        ValueError: shapes do not fit, or x has gaps.
        RuntimeError: the requested backend cannot run here.
    """
    check_shapes(share=(share, tuple(x.shape)), offset=(offset, (x.shape[-1],)))
    if not x.is_contiguous():
        raise ValueError("x must have no gaps, as it is changed in place.")
    choice = select(
        "layer_norm_of_sum_", IN_PLACE_BACKENDS, situation_of(x, share, offset)._replace(result=dtype), backend
    )
    return choice.backend.function(x, share, offset, eps, dtype)


__all__ = [
    "BACKENDS",
    "IN_PLACE_BACKENDS",
    "SUM_BACKENDS",
    "layer_norm",
    "layer_norm_and_sum",
    "layer_norm_of_sum_",
]
