"""Batch norm by the statistics of the batch, for training, with what follows it: activation, drop path, residual."""

from __future__ import annotations

import torch
from torch import Tensor

from mambavision.ops.activation import Activation
from mambavision.ops.backend import Backend, check_shapes, refuse_kernels, select, situation_of
from mambavision.ops.batch_norm.reference import batch_norm_reference

ACTIVATIONS = ("none", "relu", "gelu_tanh")  # those whose derivative the kernels know


def _triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor]:
    from mambavision.ops.batch_norm.triton_op import batch_norm

    found: tuple[Tensor, Tensor, Tensor] = batch_norm(x, weight, bias, scale, residual, eps, activation)
    return found


BACKENDS = (
    Backend("triton", _triton, "GPU kernels", refuse_kernels),
    Backend("reference", batch_norm_reference, "plain PyTorch, runs and exports everywhere", lambda _: None),
)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float,
    activation: Activation = "none",
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """act(norm(x) weight + bias) scale + residual, normed over batch, height and width (Ioffe & Szegedy, 1502.03167).

    Args:
        x: (batch, channels, height, width); the kernels want it channels-last, and copy it where it is not.
        weight: (channels,), of any floating type, as the next.
        bias: (channels,).
        scale: (batch,), of pictures before the residual is added (stochastic depth), without a gradient, or None.
        residual: of the shape of x, or None.
        eps: added to the variance.
        activation: `none`, `relu` or `gelu_tanh`.
        backend: `auto`, or the name of one of `BACKENDS`.

    Returns:
        The result in the common type of x and residual, and of each channel the mean and the biased variance,
        (channels,) float32 or wider, which have no gradient.

    Raises:
        ValueError: shapes do not fit, there is nothing to norm by, or no such activation.
        RuntimeError: the requested backend cannot run here.
    """
    channels = (x.shape[1],)
    check_shapes(
        weight=(weight, channels), bias=(bias, channels), scale=(scale, x.shape[:1]), residual=(residual, x.shape)
    )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    if x.numel() <= x.shape[1]:
        raise ValueError(f"Statistics need more than one value a channel, got x of {tuple(x.shape)}.")
    choice = select("batch_norm", BACKENDS, situation_of(x, weight, bias, residual), backend)
    return choice.backend.function(x, weight, bias, scale, residual, eps, activation)


def refuse_batch_norm_kernels(x: Tensor) -> str | None:
    """Why the op is not worth its place on a map, or None: the kernels do not run, or would have to copy it."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the map is not channels-last"
    return BACKENDS[0].refusal(situation_of(x))


__all__ = ["ACTIVATIONS", "BACKENDS", "batch_norm", "refuse_batch_norm_kernels"]
