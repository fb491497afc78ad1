"""The convolution over tokens as an operator that PyTorch knows. Imported only where the backend runs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from mambavision.ops.launch import launcher
from mambavision.ops.tiles import common_unit
from mambavision.ops.token_conv.kernels import token_conv_kernel

BLOCK_M, BLOCK_N = 32, 64


@triton_op("mambavision::token_conv", mutates_args=())
def token_conv(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU(conv(x)), (windows, length, channels), contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    windows, length, channels = x.shape
    rows = windows * length
    if rows:
        x = (x if x.stride(2) == 1 else x.contiguous()).reshape(rows, channels)
        unit = common_unit(channels, x.stride(0))
        launcher(token_conv_kernel)[(triton.cdiv(channels, BLOCK_N), triton.cdiv(rows, BLOCK_M))](
            x, weight.contiguous(), out, rows, length, channels, x.stride(0) // unit, channels // unit,
            UNIT=unit, KERNEL=weight.shape[-1], BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4,
        )  # fmt: skip
    return out
