"""The pre-norm residual block of levels 2 and 3 (paper, equation 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambavision.layers.drop_path import DropPath
from mambavision.layers.plain import are_plain
from mambavision.ops import linear_gelu


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:  # (..., dim), the same out
        exact = are_plain(self.fc1, self.act) and self.act.approximate == "none"
        if x.is_cuda and exact and self.fc1.bias is not None:
            return self.fc2(linear_gelu(x, self.fc1.weight, self.fc1.bias))
        return self.fc2(self.act(self.fc1(x)))


class TokenBlock(nn.Module):
    """x + gamma_1 mixer(norm1(x)), then x + gamma_2 mlp(norm2(x)); the mixer scans or attends."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, **factory)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.gamma_1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale, **factory))
        self.gamma_2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale, **factory))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (windows, length, dim), the same out
        x = x + self.drop_path(_scaled(self.mixer(self.norm1(x)), self.gamma_1))
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.gamma_2))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma
