"""Multi-head self-attention over the tokens of a window (paper, equation 8), without a position term."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# All but cuDNN's, whose backward gives NaN at some lengths, 64 among them (PyTorch issue 196678).
_TRAINING_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(head_dim)) V through PyTorch's fused kernels; dropout of the weights in training only."""

    def __init__(self, dim: int, *, num_heads: int, attn_drop: float = 0.0, **factory: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:  # (windows, length, dim), the same out
        windows, length, dim = x.shape
        qkv = self.qkv(x).reshape(windows, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (windows, heads, length, head_dim) each
        with sdpa_kernel(_TRAINING_BACKENDS) if x.is_cuda and torch.is_grad_enabled() else nullcontext():
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return self.proj(x.transpose(1, 2).reshape(windows, length, dim))
