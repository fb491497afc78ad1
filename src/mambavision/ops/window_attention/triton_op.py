"""The window attention's kernel as an operator that PyTorch knows. Imported only where the backend runs."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from mambavision.ops.launch import launcher
from mambavision.ops.window_attention.kernels import window_attention_kernel

QUERIES = 64


@triton_op("mambavision::window_attention", mutates_args=())
def window_attention(qkv: Tensor, heads: int, scale: float) -> Tensor:
    """softmax(scale Q K^T) V, (windows, length, channels / 3), contiguous."""
    windows, length, channels = qkv.shape
    out = torch.empty((windows, length, channels // 3), dtype=qkv.dtype, device=qkv.device)
    if out.numel():
        width = channels // (3 * heads)
        launcher(window_attention_kernel)[(windows * heads, triton.cdiv(length, QUERIES))](
            qkv.contiguous(), out, length, heads, scale / math.log(2),
            WIDTH=width, BLOCK_D=max(16, triton.next_power_of_2(width)),
            BLOCK_L=max(16, triton.next_power_of_2(length)), BLOCK_Q=QUERIES, num_warps=4,
        )  # fmt: skip
    return out
