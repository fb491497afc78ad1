"""Linear, exact GELU, linear, as one op with a gradient."""

from __future__ import annotations

from torch import Tensor

from mambavision.ops.backend import Backend, Situation, refuse_kernels, select, situation_of
from mambavision.ops.mlp.reference import mlp_reference


def _triton(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    from mambavision.ops.mlp.triton_op import mlp

    y, *_ = mlp(x, weight1, bias1, weight2, bias2)
    assert isinstance(y, Tensor)
    return y


def _refuse_triton(situation: Situation) -> str | None:
    if not situation.differentiated:
        return "its kernel is for the backward"
    return refuse_kernels(situation)


BACKENDS = (
    Backend("triton", _triton, "a GPU kernel for the backward of the GELU", _refuse_triton),
    Backend("reference", mlp_reference, "plain PyTorch, runs and exports everywhere", lambda _: None),
)


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, *, backend: str = "auto") -> Tensor:
    """GELU(x weight1^T + bias1) weight2^T + bias2.

    Args:
        x: (..., channels).
        weight1: (hidden, channels), like all parameters of the type of x.
        bias1: (hidden,).
        weight2: (channels, hidden).
        bias2: (channels,).
        backend: `auto`, or the name of one of `BACKENDS`.

    Returns:
        (..., channels) in the type of x.

    Raises:
        ValueError: shapes do not fit.
        RuntimeError: the requested backend cannot run here.
    """
    hidden, channels = weight1.shape
    if x.shape[-1] != channels or weight2.shape != (channels, hidden):
        raise ValueError(
            f"x must have {channels} channels and weight2 be {(channels, hidden)} to fit weight1 {(hidden, channels)}, "
            f"got {tuple(x.shape)} and {tuple(weight2.shape)}."
        )
    situation = situation_of(x, weight1, bias1, weight2, bias2)
    return select("mlp", BACKENDS, situation, backend).backend.function(x, weight1, bias1, weight2, bias2)


__all__ = ["BACKENDS", "mlp"]
