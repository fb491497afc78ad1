"""Linear layer with what surrounds it: a norm before, bias, activation and residual behind."""

from __future__ import annotations

from math import prod

from torch import Tensor

from mambavision.ops.activation import Activation, check_activation
from mambavision.ops.backend import Backend, check_shapes, refuse_inference_kernels, select, situation_of
from mambavision.ops.linear.reference import PART, linear_reference, linear_with_moments_reference


def _triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_eps: float | None,
    weight_sum: Tensor | None,
    activation: Activation,
    moments: Tensor | None,
) -> Tensor:
    from mambavision.ops.linear.triton_op import linear

    if norm_eps is None:
        weight_sum = None
    elif weight_sum is None:
        weight_sum = weight.float().sum(1)
    y: Tensor = linear(x, weight, bias, residual, weight_sum, norm_eps or 0.0, activation, moments)
    return y


BACKENDS = (
    Backend("triton", _triton, "GPU kernel", refuse_inference_kernels),
    Backend("reference", linear_reference, "plain PyTorch, runs and exports everywhere", lambda _: None),
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm_eps: float | None = None,
    weight_sum: Tensor | None = None,
    moments: Tensor | None = None,
    activation: Activation = "none",
    backend: str = "auto",
) -> Tensor:
    """act(norm(x) weight^T + bias) + residual, for inference.

    Args:
        x: input, (..., inner).
        weight: (columns, inner), of the type of x.
        bias: (columns,), or None.
        residual: (..., columns), added last, or None.
        norm_eps: with a number, x is first layer-normalised over its last dimension, without scale and shift.
        weight_sum: sums of the weight's rows, (columns,), float32; they spare the kernel a pass when x is normalised.
        moments: of x, as `linear_with_moments` has given them with it; they spare the kernel another.
        activation: `none`, `relu`, `gelu` (by erf; the kernel's is within 6e-5 of it) or `gelu_tanh`.
        backend: `auto`, or the name of one of `BACKENDS`.

    Returns:
        (..., columns) in the type of x.

    Raises:
        ValueError: shapes do not fit, or no such activation.
        RuntimeError: the requested backend cannot run here.
    """
    columns, inner = weight.shape
    if x.shape[-1] != inner:
        raise ValueError(f"x must have {inner} channels to fit the weight {tuple(weight.shape)}, got {tuple(x.shape)}.")
    check_activation(activation)
    check_shapes(
        bias=(bias, (columns,)),
        weight_sum=(weight_sum, (columns,)),
        moments=(moments, (prod(x.shape[:-1]), 2, -(-inner // PART))),
        residual=(residual, (*x.shape[:-1], columns)),
    )
    choice = select("linear", BACKENDS, situation_of(x, weight, bias, residual), backend)
    return choice.backend.function(x, weight, bias, residual, norm_eps, weight_sum, activation, moments)


def _triton_with_moments(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    from mambavision.ops.linear.triton_op import linear_with_moments

    y, moments = linear_with_moments(x, weight, bias, residual)
    return y, moments


MOMENTS_BACKENDS = (
    Backend("triton", _triton_with_moments, "GPU kernel", refuse_inference_kernels),
    Backend("reference", linear_with_moments_reference, "plain PyTorch, runs and exports everywhere", lambda _: None),
)


def linear_with_moments(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """X weight^T + bias + residual for inference, and what normalising it takes.

    Args:
        x: input, (..., inner).
        weight: (columns, inner), of the type of x.
        bias: (columns,), or None.
        residual: (..., columns), added last, or None.
        backend: `auto`, or the name of one of `MOMENTS_BACKENDS`.

    Returns:
        The result, (..., columns) in the type of x; and of each 16 columns of its rows the mean and the sum of squares
        around it, (rows, 2, ceil(columns / 16)), float32 or wider.

    Raises:
        ValueError: shapes do not fit.
        RuntimeError: the requested backend cannot run here.
    """
    columns, inner = weight.shape
    check_shapes(x=(x, (*x.shape[:-1], inner)), bias=(bias, (columns,)), residual=(residual, (*x.shape[:-1], columns)))
    choice = select("linear_with_moments", MOMENTS_BACKENDS, situation_of(x, weight, bias, residual), backend)
    return choice.backend.function(x, weight, bias, residual)


__all__ = ["BACKENDS", "MOMENTS_BACKENDS", "linear", "linear_with_moments"]
