"""The layer norm's kernel as an operator that PyTorch knows. Imported only where the backend runs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from mambavision.ops.launch import dense, launcher
from mambavision.ops.layer_norm.kernels import layer_norm_kernel

BLOCK = 4096  # elements a program, so that each thread has two loads of 16 bytes under way


@triton_op("mambavision::layer_norm", mutates_args=())
def layer_norm(x: Tensor, offset: Tensor | None, eps: float) -> Tensor:
    """The norm of x + offset, contiguous."""
    x, offset = x.contiguous(), dense(offset)
    out = torch.empty_like(x)
    channels = x.shape[-1]
    rows = x.numel() // channels
    if rows:
        columns = triton.next_power_of_2(channels)
        block = max(1, BLOCK // columns)
        launcher(layer_norm_kernel)[(triton.cdiv(rows, block),)](
            x, offset, out, rows, channels, eps,
            BLOCK_M=block, BLOCK_N=columns, HAS_OFFSET=offset is not None, num_warps=8,
        )  # fmt: skip
    return out
