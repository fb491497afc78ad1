"""Rounding to 8 bits as an operator that PyTorch knows. Imported only where the backend runs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from mambavision.ops.float8.kernels import to_float8_kernel
from mambavision.ops.launch import launcher

BLOCK = 4096  # elements a program


@triton_op("mambavision::to_float8", mutates_args=())
def to_float8(x: Tensor) -> Tensor:
    """All numbers rounded to float8_e4m3fn, with the strides of x where they leave no gaps."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    x = x.permute(order).contiguous()
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    size = x.numel()
    if size:
        launcher(to_float8_kernel)[(triton.cdiv(size, BLOCK),)](x, out, size, BLOCK=BLOCK, num_warps=8)
    return out.permute([order.index(dim) for dim in range(x.dim())])
