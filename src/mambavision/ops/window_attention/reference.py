"""Window attention by PyTorch's own fused attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def window_attention_reference(qkv: Tensor, heads: int, scale: float) -> Tensor:
    """Arguments and result as in `mambavision.ops.window_attention`."""
    windows, length, channels = qkv.shape
    q, k, v = qkv.reshape(windows, length, 3, heads, channels // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, scale=scale)  # (windows, heads, length, width)
    return y.transpose(1, 2).reshape(windows, length, channels // 3)
