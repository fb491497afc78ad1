"""The pre-norm residual block of levels 2 and 3 (paper, equation 4)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.layers.attention import Attention
from mambavision.layers.drop_path import DropPath, takes_factors
from mambavision.layers.plain import are_plain, has_hooks, is_fused
from mambavision.ops import add_layer_norm, linear_gelu
from mambavision.ops.add_layer_norm import scaled_branch
from mambavision.ops.precision import autocast_type


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:  # (..., dim), the same out
        return self.fc2(self.inner(x))

    def inner(self, x: Tensor) -> Tensor:
        """What the last layer, `fc2`, takes, (..., hidden)."""
        exact = isinstance(self.act, nn.GELU) and self.act.approximate == "none" and are_plain(self.fc1, self.act)
        if x.is_cuda and exact and self.fc1.bias is not None:
            return linear_gelu(x, self.fc1.weight, self.fc1.bias)
        return self.act(self.fc1(x))


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
        return run_blocks([self], x)


class Branch(NamedTuple):
    """A residual branch whose end is still to be added: (values + shift) gamma scale."""

    values: Tensor  # (windows, length, dim)
    shift: Tensor | None  # (dim,)
    gamma: Tensor | None  # (dim,)
    scale: Tensor | None  # (windows,)


def run_blocks(blocks: Iterable[TokenBlock], x: Tensor) -> Tensor:
    """The blocks one after another, each branch's end in one op with the norm behind it, of the next block too.

    Args:
        blocks: of one width.
        x: (windows, length, dim).

    Returns:
        (windows, length, dim).
    """
    branch = None
    for block in blocks:
        x, y = _add_and_norm(x, branch, block.norm1)
        branch = _branch(block.mixer, y, block.gamma_1, block.drop_path)
        x, y = _add_and_norm(x, branch, block.norm2)
        branch = _branch(block.mlp, y, block.gamma_2, block.drop_path)
    return x if branch is None else x + scaled_branch(*branch)


def _branch(layer: nn.Module, y: Tensor, gamma: Tensor | None, drop_path: nn.Module) -> Branch:
    """What the layer makes of y, with what is still to be done."""
    values, shift = _without_bias(layer, y)
    if takes_factors(drop_path):
        return Branch(values, shift, gamma, cast("DropPath", drop_path).factors(values))
    return Branch(drop_path(scaled_branch(values, shift, gamma, None)), None, None, None)


def _without_bias(layer: nn.Module, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """The layer's result but for its last bias, and that, where the op behind can add it and sum its gradient."""
    last = layer.proj if type(layer) is Attention else layer.fc2 if type(layer) is Mlp else None
    if not (isinstance(last, nn.Linear) and is_fused(y) and torch.is_grad_enabled()):
        return layer(y), None
    if last.bias is None or has_hooks(layer) or not are_plain(last):
        return layer(y), None
    return F.linear(cast("Attention | Mlp", layer).inner(y), last.weight), last.bias


def _add_and_norm(x: Tensor, branch: Branch | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """X + branch, and its norm, in the type of the linear layer behind it, where autocast would widen it."""
    if not (is_fused(x) and are_plain(norm)) or norm.weight is None or norm.bias is None:
        x = x if branch is None else x + scaled_branch(*branch)
        return x, norm(x)
    values, shift, gamma, scale = (None, None, None, None) if branch is None else branch
    return add_layer_norm(
        x, values, norm.weight, norm.bias, shift=shift, gamma=gamma, scale=scale, eps=norm.eps, dtype=autocast_type(x)
    )
