"""Layer norm without scale and shift, of a sum with a constant vector or beside one."""

from __future__ import annotations

from torch import Tensor

from mambavision.ops.backend import Backend, check_shapes, refuse_inference_kernels, select, situation_of
from mambavision.ops.layer_norm.reference import layer_norm_and_sum_reference, layer_norm_reference


def _triton(x: Tensor, offset: Tensor | None, eps: float) -> Tensor:
    from mambavision.ops.layer_norm.triton_op import layer_norm

    y: Tensor = layer_norm(x, offset, eps)
    return y


BACKENDS = (
    Backend("triton", _triton, "GPU kernel", refuse_inference_kernels),
    Backend("reference", layer_norm_reference, "plain PyTorch, runs and exports everywhere", lambda _: None),
)


def layer_norm(x: Tensor, offset: Tensor | None = None, *, eps: float, backend: str = "auto") -> Tensor:
    """The norm of x + offset over the last dimension, for inference.

    Args:
        x: (..., channels).
        offset: (channels,), float32, added in float32, or None.
        eps: added to the variance.
        backend: `auto`, or the name of one of `BACKENDS`.

    Returns:
        (..., channels) in the type of x.

    Raises:
        ValueError: shapes do not fit.
        RuntimeError: the requested backend cannot run here.
    """
    check_shapes(offset=(offset, (x.shape[-1],)))
    return select("layer_norm", BACKENDS, situation_of(x, offset), backend).backend.function(x, offset, eps)


def _triton_and_sum(x: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from mambavision.ops.layer_norm.triton_op import layer_norm_and_sum

    y, total = layer_norm_and_sum(x, shift, eps)
    return y, total


SUM_BACKENDS = (
    Backend("triton", _triton_and_sum, "GPU kernel", refuse_inference_kernels),
    Backend("reference", layer_norm_and_sum_reference, "plain PyTorch, runs and exports everywhere", lambda _: None),
)


def layer_norm_and_sum(x: Tensor, shift: Tensor, *, eps: float, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The norm of x over the last dimension, and x + shift, for inference.

    Args:
        x: (..., channels).
        shift: (channels,), of any floating type.
        eps: added to the variance.
        backend: `auto`, or the name of one of `SUM_BACKENDS`.

    Returns:
        Both (..., channels) in the type of x.

    Raises:
        ValueError: shapes do not fit.
        RuntimeError: the requested backend cannot run here.
    """
    check_shapes(shift=(shift, (x.shape[-1],)))
    return select("layer_norm_and_sum", SUM_BACKENDS, situation_of(x, shift), backend).backend.function(x, shift, eps)


__all__ = ["BACKENDS", "SUM_BACKENDS", "layer_norm", "layer_norm_and_sum"]
