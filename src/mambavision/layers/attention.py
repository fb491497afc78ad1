"""Multi-head self-attention over the tokens of a window (paper, equation 8), without a position term."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# All but cuDNN's, whose backward gives NaN at some lengths, 64 among them (PyTorch issue 196678).
TRAINING_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SHORT_LENGTH = 64  # tokens up to which memory-efficient attention beats flash attention, whose tiles are larger
_SHORT_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(head_dim)) V; dropout of the weights in training only.

    Attributes:
        fused_attn: use PyTorch's fused kernels, which never form the weights. With False the weights (windows, heads,
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
        windows, length, dim = x.shape
        qkv = self.qkv(x).reshape(windows, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (windows, heads, length, head_dim) each
        if self.fused_attn:
            # In half precision the memory-efficient one takes only heads whose width is a multiple of 8.
            short = length <= SHORT_LENGTH and q.shape[-1] % 8 == 0
            backends = _SHORT_BACKENDS if short else TRAINING_BACKENDS
            with sdpa_kernel(backends) if x.is_cuda and torch.is_grad_enabled() else nullcontext():
                x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (windows, heads, length, length)
            x = self.attn_drop(scores.softmax(-1)) @ v
        return self.proj(x.transpose(1, 2).reshape(windows, length, dim))
