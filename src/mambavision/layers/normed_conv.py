"""A convolution with its batch norm and what follows, computed together in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.layers.plain import are_plain, is_fused
from mambavision.ops.batch_norm import batch_norm, refuse_batch_norm_kernels
from mambavision.ops.conv3x3 import conv3x3_for_training
from mambavision.ops.tracing import is_exporting

if TYPE_CHECKING:
    from mambavision.ops.activation import Activation


def normed_conv(
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    x: Tensor,
    *,
    act: nn.Module | None = None,
    gamma: nn.Parameter | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(norm(conv(x))) gamma scale + residual, each left out where it is None; the norm's statistics follow.

    Args:
        conv: a convolution of maps.
        norm: its batch norm.
        x: (batch, channels in, height, width).
        act: an activation.
        gamma: (channels out,), never with `act`.
        scale: (batch,), without a gradient.
        residual: of the result's shape.

    Returns:
        (batch, channels out, height, width).
    """
    if not (are_plain(norm) and _norms_by_batch(norm)) or x.shape[0] == 0:
        return _followed(norm(conv(x)), act, gamma, scale, residual)
    # The norm takes off what is constant, so the bias is spared two passes over the map.
    spared = are_plain(conv) and conv.bias is not None and conv.padding_mode == "zeros"
    y = _without_bias(conv, x) if spared else conv(x)
    bias = cast("Tensor", conv.bias) if spared else None
    activation = None if act is None else _named(act)
    fits = (act is None or activation) and y.numel() > y.shape[1]
    if fits and is_fused(y) and refuse_batch_norm_kernels(y) is None:
        return _in_one_op(norm, y, bias, activation or "none", gamma, scale, residual)
    y = norm(y) if bias is None else _normed_without(bias, norm, y)
    return _followed(y, act, gamma, scale, residual)


def _without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution alone; by the op for training where it is one that this computes, and gradients are enabled."""
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    if geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and is_fused(x) and torch.is_grad_enabled():
        return conv3x3_for_training(x, conv.weight)
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def _norms_by_batch(norm: nn.BatchNorm2d) -> bool:
    """Whether the norm is in training, with parameters, and keeps means that move by a part each step.

    Never in an export, whose graph is to have the norm as it is.
    """
    if is_exporting():
        return False
    kept = norm.track_running_stats and norm.running_mean is not None and norm.num_batches_tracked is not None
    return norm.training and norm.affine and kept and norm.momentum is not None and norm.momentum < 1


def _named(act: nn.Module) -> Activation | None:
    """The activation's name for the op, or None if it has none there."""
    if not are_plain(act):
        return None
    if isinstance(act, nn.ReLU):
        return "relu"
    return "gelu_tanh" if isinstance(act, nn.GELU) and act.approximate == "tanh" else None


def _in_one_op(
    norm: nn.BatchNorm2d,
    y: Tensor,
    conv_bias: Tensor | None,
    activation: Activation,
    gamma: nn.Parameter | None,
    scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """By the op, whose kernels write each map once; the norm's running statistics follow."""
    weight: Tensor = norm.weight
    shift: Tensor = norm.bias
    if gamma is not None:
        weight, shift = weight * gamma, shift * gamma
        if residual is not None:  # the product with gamma is as wide as gamma, and so is the sum
            residual = residual.to(torch.promote_types(torch.promote_types(y.dtype, gamma.dtype), residual.dtype))
    if conv_bias is not None:
        shift = shift + _no_gradient(conv_bias)
    out, mean, variance = batch_norm(
        y, weight, shift, scale=scale, residual=residual, eps=norm.eps, activation=activation
    )
    with torch.no_grad():
        values = y.numel() // y.shape[1]
        mean = mean if conv_bias is None else mean + conv_bias
        for kept, new in ((norm.running_mean, mean), (norm.running_var, variance * (values / (values - 1)))):
            cast("Tensor", kept).lerp_(new.to(cast("Tensor", kept).dtype), cast("float", norm.momentum))
        cast("Tensor", norm.num_batches_tracked).add_(1)
    return out


def _normed_without(bias: Tensor, norm: nn.BatchNorm2d, y: Tensor) -> Tensor:
    """norm(y + bias) by PyTorch's own operations."""
    momentum = cast("float", norm.momentum)
    # So that behind the norm's own step, (1 - momentum) old + momentum new, the bias counts in the mean. It is a new
    # tensor, since the backward wants it unchanged and the next forward may come first.
    mean = cast("Tensor", norm.running_mean) + bias.detach() * (momentum / (1 - momentum))
    y = F.batch_norm(y, mean, norm.running_var, norm.weight, norm.bias + _no_gradient(bias), True, momentum, norm.eps)
    # By `data`, as PyTorch's own step: a backward that has kept the mean from evaluation is not disturbed.
    cast("Tensor", norm.running_mean).data.copy_(mean)
    cast("Tensor", norm.num_batches_tracked).add_(1)
    return y


def _no_gradient(bias: Tensor) -> Tensor:
    """Zeros that give the bias a gradient of zeros, where otherwise it would have none."""
    return bias - bias


def _followed(
    y: Tensor, act: nn.Module | None, gamma: nn.Parameter | None, scale: Tensor | None, residual: Tensor | None
) -> Tensor:
    """What comes behind the norm, one by one."""
    if act is not None:
        y = act(y)
    if gamma is not None:
        y = y * gamma[:, None, None]
    if scale is not None:
        y = y * scale[:, None, None, None]
    return y if residual is None else residual + y
