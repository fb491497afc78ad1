"""Linear layer with the GELU behind it, as one op with a gradient; the first half of an MLP."""

from __future__ import annotations

from torch import Tensor

from mambavision.ops.backend import Backend, Situation, refuse_kernels, select, situation_of
from mambavision.ops.linear_gelu.reference import linear_gelu_reference


def _triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from mambavision.ops.linear_gelu.triton_op import linear_gelu

    return linear_gelu(x, weight, bias)


def _refuse_triton(situation: Situation) -> str | None:
    return refuse_kernels(situation) if situation.differentiated else "its kernel is for the backward"


BACKENDS = (
    Backend("triton", _triton, "GPU kernels of GELU, and of its backward with the bias", _refuse_triton),
    Backend("reference", linear_gelu_reference, "plain PyTorch, runs and exports everywhere", lambda _: None),
)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """GELU(x weight^T + bias), by erf; of the kernels within 6e-5 of that in 16 bits.

    Args:
        x: (..., inner); under autocast the product has autocast's type.
        weight: (columns, inner).
        bias: (columns,).
        backend: `auto`, or the name of one of `BACKENDS`.

    Returns:
        (..., columns) in the type of the product.

    Raises:
        RuntimeError: shapes do not fit, or the requested backend cannot run here.
    """
    choice = select("linear_gelu", BACKENDS, situation_of(x, weight, bias), backend)
    return choice.backend.function(x, weight, bias)


__all__ = ["BACKENDS", "linear_gelu"]
