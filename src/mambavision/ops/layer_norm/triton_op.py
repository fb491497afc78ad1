"""The layer norm's kernel as operators that PyTorch knows. Imported only where the backend runs."""

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
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(x, dense(offset), out, None, None, eps)
    return out


@triton_op("mambavision::layer_norm_and_sum", mutates_args=())
def layer_norm_and_sum(x: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x, and x + shift, both contiguous."""
    x = x.contiguous()
    out, shifted = torch.empty_like(x), torch.empty_like(x)
    _launch(x, None, out, shift.contiguous(), shifted, eps)
    return out, shifted


def _launch(
    x: Tensor, offset: Tensor | None, out: Tensor, shift: Tensor | None, shifted: Tensor | None, eps: float
) -> None:
    channels = x.shape[-1]
    rows = x.numel() // channels
    if rows:
        columns = triton.next_power_of_2(channels)
        block = max(1, BLOCK // columns)
        launcher(layer_norm_kernel)[(triton.cdiv(rows, block),)](
            x, offset, out, shift, shifted, rows, channels, eps,
            BLOCK_M=block, BLOCK_N=columns, HAS_OFFSET=offset is not None, HAS_SHIFT=shift is not None, num_warps=8,
        )  # fmt: skip
