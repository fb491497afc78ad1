"""The sum of what a kernel's programs add to a gradient, in Triton; imported only where kernels run.

PyTorch's own sum clears memory first and takes several launches for so few numbers.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mambavision.ops.column_sums_kernels import column_sums_kernel
from mambavision.ops.launch import launcher
from mambavision.ops.tiles import common_unit

BLOCK_M, BLOCK_N = 256, 16


def column_sums(parts: Tensor) -> Tensor:
    """(parts, ...), float32, contiguous, summed over the parts; inside a `triton_op`."""
    sums = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
    columns = sums.numel()
    unit = common_unit(columns)
    launcher(column_sums_kernel)[(triton.cdiv(columns, BLOCK_N),)](
        parts, sums, parts.shape[0], columns // unit, UNIT=unit, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=8
    )
    return sums
