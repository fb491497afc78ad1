"""Linear layer with what surrounds it: a norm before, bias, activation and residual behind."""

from __future__ import annotations

from torch import Tensor

from mambavision.ops.activation import Activation, check_activation
from mambavision.ops.backend import Backend, check_shapes, refuse_inference_kernels, select, situation_of
from mambavision.ops.linear.reference import linear_reference


def _triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_eps: float | None,
    weight_sum: Tensor | None,
    activation: Activation,
) -> Tensor:
    from mambavision.ops.linear.triton_op import linear

    if norm_eps is None:
        weight_sum = None
    elif weight_sum is None:
        weight_sum = weight.float().sum(1)
    y: Tensor = linear(x, weight, bias, residual, weight_sum, norm_eps or 0.0, activation)
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
        bias=(bias, (columns,)), weight_sum=(weight_sum, (columns,)), residual=(residual, (*x.shape[:-1], columns))
    )
    choice = select("linear", BACKENDS, situation_of(x, weight, bias, residual), backend)
    return choice.backend.function(x, weight, bias, residual, norm_eps, weight_sum, activation)


__all__ = ["BACKENDS", "linear"]
