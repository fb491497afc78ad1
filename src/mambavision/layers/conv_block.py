"""The residual convolution block of levels 0 and 1 (paper, equation 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambavision.layers.drop_path import DropPath, takes_factors
from mambavision.layers.normed_conv import normed_conv


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
        branch = normed_conv(self.conv1, self.norm1, x, act=self.act1)
        if not takes_factors(self.drop_path):
            return x + self.drop_path(normed_conv(self.conv2, self.norm2, branch, gamma=self.gamma))
        scale = self.drop_path.factors(x)
        return normed_conv(self.conv2, self.norm2, branch, gamma=self.gamma, scale=scale, residual=x)
