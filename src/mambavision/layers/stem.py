"""The stem and the steps between levels: strided 3x3 convolutions (paper, section 3.1)."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.layers.normed_conv import normed_conv
from mambavision.layers.plain import has_hooks, is_fused
from mambavision.ops.precision import HALVES

CHANNEL_UNIT = 8


class FewChannelConv(nn.Conv2d):
    """`nn.Conv2d` for pictures; in half precision on a GPU with zeros for as many channels as its matrix units want."""

    def forward(self, x: Tensor) -> Tensor:  # (batch, in_channels, H, W)
        half = torch.is_autocast_enabled("cuda") or x.dtype in HALVES
        more = -self.in_channels % CHANNEL_UNIT
        if not (x.is_cuda and half and more):
            return super().forward(x)
        padding = (0, 0, 0, 0, 0, more)
        return F.conv2d(F.pad(x, padding), F.pad(self.weight, padding), self.bias, self.stride, self.padding)


class Stem(nn.Module):
    """Two 3x3 convolutions with batch norm and ReLU; by default a quarter of the resolution."""

    def __init__(
        self, in_chans: int, in_dim: int, dim: int, *, strides: tuple[int, int] = (2, 2), **factory: Any
    ) -> None:
        super().__init__()
        self.conv_down = nn.Sequential(
            FewChannelConv(in_chans, in_dim, 3, strides[0], 1, bias=False, **factory),
            nn.BatchNorm2d(in_dim, eps=1e-4, **factory),
            nn.ReLU(),
            nn.Conv2d(in_dim, dim, 3, strides[1], 1, bias=False, **factory),
            nn.BatchNorm2d(dim, eps=1e-4, **factory),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:  # (batch, in_chans, H, W) -> (batch, dim, H / strides, W / strides)
        if not is_fused(x) or has_hooks(self.conv_down):
            return self.conv_down(x)
        conv1, norm1, act1, conv2, norm2, act2 = cast("Any", self.conv_down)
        return normed_conv(conv2, norm2, normed_conv(conv1, norm1, x, act=act1), act=act2)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 that doubles the channels."""

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.reduction = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False, **factory))

    def forward(self, x: Tensor) -> Tensor:  # (batch, dim, H, W) -> (batch, 2 dim, ceil(H / 2), ceil(W / 2))
        return self.reduction(x)
