"""The residual convolution block of levels 0 and 1 (paper, equation 1)."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.layers.drop_path import DropPath
from mambavision.layers.plain import are_plain


class ConvBlock(nn.Module):
    """x + BN(conv(GELU(BN(conv(x))))), both convolutions 3x3, GELU in its tanh form."""

    def __init__(self, dim: int, *, layer_scale: float | None = None, drop_path: float = 0.0, **factory: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, 1, 1, **factory)
        self.norm1 = nn.BatchNorm2d(dim, eps=1e-5, **factory)
        self.act1 = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1, **factory)
        self.norm2 = nn.BatchNorm2d(dim, eps=1e-5, **factory)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale, **factory))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (batch, dim, H, W), the same out
        branch = self.act1(_normed_conv(self.conv1, self.norm1, x))
        branch = _normed_conv(self.conv2, self.norm2, branch)
        if self.gamma is not None:
            branch = branch * self.gamma[:, None, None]
        return x + self.drop_path(branch)


def _normed_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """norm(conv(x)). In training the norm takes off what is constant, so the bias is spared two passes over the map."""
    if not (are_plain(conv, norm) and _norms_by_batch(norm)) or conv.bias is None or conv.padding_mode != "zeros":
        return norm(conv(x))
    bias, momentum = conv.bias, cast("float", norm.momentum)
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    # So that behind the norm's own step, (1 - momentum) old + momentum new, the bias counts in the mean. It is a new
    # tensor, since the backward wants it unchanged and the next forward may come first.
    mean = cast("Tensor", norm.running_mean) + bias.detach() * (momentum / (1 - momentum))
    shift = norm.bias + (bias - bias)  # so that its gradient is zero, and not missing
    y = F.batch_norm(y, mean, norm.running_var, norm.weight, shift, True, momentum, norm.eps)
    cast("Tensor", norm.running_mean).copy_(mean)
    cast("Tensor", norm.num_batches_tracked).add_(1)
    return y


def _norms_by_batch(norm: nn.BatchNorm2d) -> bool:
    """Whether the norm is in training, with parameters, and keeps means that move by a part each step."""
    moves = norm.running_mean is not None and norm.momentum is not None and norm.momentum < 1
    return norm.training and norm.affine and moves
