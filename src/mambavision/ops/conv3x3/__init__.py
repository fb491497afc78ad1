"""3x3 convolution with what follows it: bias, activation, residual."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mambavision.ops.activation import Activation, check_activation
from mambavision.ops.backend import Backend, check_shapes, refuse_inference_kernels, select, situation_of
from mambavision.ops.conv3x3.reference import conv3x3_reference
from mambavision.ops.map_layout import padded_to_lines
from mambavision.ops.precision import autocast_type


def _triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: int, activation: Activation
) -> Tensor:
    from mambavision.ops.conv3x3.triton_op import conv3x3

    y: Tensor = conv3x3(x, weight, bias, residual, stride, activation)
    return y


BACKENDS = (
    Backend("triton", _triton, "GPU kernel", refuse_inference_kernels),
    Backend("reference", conv3x3_reference, "plain PyTorch, runs and exports everywhere", lambda _: None),
)


def conv3x3_for_training(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution with padding 1, differentiable; in autocast's type by a kernel where that is faster than PyTorch's.

    Args:
        x: map, (batch, channels, H, W).
        weight: (columns, channels, 3, 3).

    Returns:
        (batch, columns, H, W), in the type of autocast or of x.
    """
    dtype = autocast_type(x, weight)
    if dtype and x.is_cuda:
        from mambavision.ops.hopper import conv3x3_op as hopper

        if hopper.serves(x, weight, dtype):
            y: Tensor = hopper.conv3x3(x.to(dtype), weight.to(dtype))
            return y
    return F.conv2d(x, weight, padding=1)


def aligned_rows(weight: Tensor, *, bytes_each: int) -> Tensor:
    """A weight (columns, channels, 3, 3) as rows (columns, taps x (channels and zeros)), each tap in lines of its own.

    See `mambavision.ops.map_layout.padded_to_lines`.
    """
    return padded_to_lines(weight.permute(0, 2, 3, 1), bytes_each=bytes_each).flatten(1)


def weight_of_rows(rows: Tensor, channels: int) -> Tensor:
    """The weight (columns, channels, 3, 3) that `aligned_rows` made rows of, as a view."""
    return rows.view(len(rows), 3, 3, -1)[..., :channels].permute(0, 3, 1, 2)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    stride: int = 1,
    activation: Activation = "none",
    backend: str = "auto",
) -> Tensor:
    """act(conv(x) + bias) + residual with padding 1, for inference.

    Args:
        x: map, (batch, channels, H, W); fastest channels-last, with a multiple of 16 channels.
        weight: (columns, channels, 3, 3), of the type of x; fastest as `weight_of_rows` gives it.
        bias: (columns,), or None.
        residual: (batch, columns, ceil(H / stride), ceil(W / stride)), added last, or None.
        stride: 1 or 2.
        activation: `none`, `relu`, `gelu` or `gelu_tanh`.
        backend: `auto`, or the name of one of `BACKENDS`.

    Returns:
        (batch, columns, ceil(H / stride), ceil(W / stride)) in the type of x.

    Raises:
        ValueError: shapes do not fit, or no such stride or activation.
        RuntimeError: the requested backend cannot run here.
    """
    if x.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(f"weight must be (columns, {x.shape[1]}, 3, 3) to fit the map, got {tuple(weight.shape)}.")
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}.")
    check_activation(activation)
    columns, (batch, _, height, width) = weight.shape[0], x.shape
    map_shape = (batch, columns, -(-height // stride), -(-width // stride))
    check_shapes(bias=(bias, (columns,)), residual=(residual, map_shape))
    choice = select("conv3x3", BACKENDS, situation_of(x, weight, bias, residual), backend)
    return choice.backend.function(x, weight, bias, residual, stride, activation)


__all__ = ["BACKENDS", "aligned_rows", "conv3x3", "conv3x3_for_training", "weight_of_rows"]
