"""The end of a residual branch and the layer norm behind it, with a gradient, for training."""

from __future__ import annotations

import torch
from torch import Tensor

from mambavision.ops.add_layer_norm.reference import add_layer_norm_reference, scaled_branch
from mambavision.ops.backend import Backend, Situation, check_shapes, refuse_kernels, select, situation_of


def _triton(
    x: Tensor,
    branch: Tensor | None,
    shift: Tensor | None,
    gamma: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from mambavision.ops.add_layer_norm.triton_op import add_layer_norm, affine_layer_norm

    if branch is None:
        return x, affine_layer_norm(x, weight, bias, eps, dtype)[0]
    total, y, *_ = add_layer_norm(x, branch, shift, gamma, scale, weight, bias, eps, dtype)
    return total, y


def _refuse_triton(situation: Situation) -> str | None:
    return refuse_kernels(situation) if situation.differentiated else "its kernels are for training"


BACKENDS = (
    Backend("triton", _triton, "GPU kernels, forward and backward", _refuse_triton),
    Backend("reference", add_layer_norm_reference, "plain PyTorch, runs and exports everywhere", lambda _: None),
)


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    shift: Tensor | None = None,
    gamma: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum x + (branch + shift) gamma scale, and its norm over the last dimension (Ba et al., 1607.06450), affine.

    Args:
        x: (samples, ..., channels).
        branch: of the shape of x, or None, and then nothing is added.
        weight: (channels,), that the norm is multiplied with, of any floating type, as the next three.
        bias: (channels,), added to it.
        shift: (channels,), the bias of the branch's last layer where that has left it out, or None.
        gamma: (channels,), layer scale, or None.
        scale: (samples,), stochastic depth, without a gradient, or None.
        eps: added to the variance.
        dtype: of the norm; without it that of x.
        backend: `auto`, or the name of one of `BACKENDS`.

    Returns:
        The sum, in the common type of x, branch and gamma, and its norm, both (samples, ..., channels).

    Raises:
        ValueError: shapes do not fit.
        RuntimeError: the requested backend cannot run here.
    """
    channels = (x.shape[-1],)
    check_shapes(
        branch=(branch, x.shape), weight=(weight, channels), bias=(bias, channels), shift=(shift, channels),
        gamma=(gamma, channels), scale=(scale, x.shape[:1]),
    )  # fmt: skip
    choice = select("add_layer_norm", BACKENDS, situation_of(x, branch, weight, bias, shift, gamma), backend)
    return choice.backend.function(x, branch, shift, gamma, scale, weight, bias, eps, dtype or x.dtype)


__all__ = ["BACKENDS", "add_layer_norm", "scaled_branch"]
