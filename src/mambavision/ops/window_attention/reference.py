"""Attention inside windows by PyTorch's own kernels."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# All but cuDNN's: a training run with it met NaN in a gradient at a length of 64 (compare PyTorch issue 196678).
TRAINING_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SHORT_LENGTH = 64  # tokens up to which memory-efficient attention beats flash attention, whose tiles are larger
_SHORT_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def window_attention_sdpa(qkv: Tensor, num_heads: int, dropout: float, scale: float) -> Tensor:
    """Arguments and result as in `mambavision.ops.window_attention`."""
    windows, length, inner = qkv.shape
    width = inner // (3 * num_heads)
    q, k, v = qkv.reshape(windows, length, 3, num_heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    # In half precision the memory-efficient one takes only heads whose width is a multiple of 8.
    backends = _SHORT_BACKENDS if length <= SHORT_LENGTH and width % 8 == 0 else TRAINING_BACKENDS
    with sdpa_kernel(backends) if qkv.is_cuda and torch.is_grad_enabled() else nullcontext():
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)  # (windows, heads, length, width)
    return x.transpose(1, 2).reshape(windows, length, num_heads * width)
