"""Multi-head self-attention over the tokens of a window (paper, equation 8), without a position term."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mambavision.ops import window_attention


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(head_dim)) V; dropout of the weights in training only.

    Attributes:
        fused_attn: use fused kernels, which never form the weights. With False the weights (windows, heads,
            length, length) are formed and pass through `attn_drop`, where a forward hook sees them; timm's names.
    """

    def __init__(self, dim: int, *, num_heads: int, attn_drop: float = 0.0, **factory: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = True
        self.qkv = nn.Linear(dim, 3 * dim, **factory)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:  # (windows, length, dim), the same out
        return self.proj(self.inner(x))

    def inner(self, x: Tensor) -> Tensor:
        """What the last layer, `proj`, takes: the heads' values side by side, (windows, length, dim)."""
        windows, length, dim = x.shape
        qkv = self.qkv(x)
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            return window_attention(qkv, num_heads=self.num_heads, dropout=dropout)
        qkv = qkv.reshape(windows, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (windows, heads, length, head_dim) each
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (windows, heads, length, length)
        x = self.attn_drop(scores.softmax(-1)) @ v
        return x.transpose(1, 2).reshape(windows, length, dim)
