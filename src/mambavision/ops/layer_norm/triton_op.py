"""The layer norm's kernel as operators that PyTorch knows. Imported only where the backend runs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from mambavision.ops.launch import dense, launcher
from mambavision.ops.layer_norm.kernels import layer_norm_kernel

ROWS, COLUMNS_OF_A_WARP = 4, 512  # of a program: a row's sum then takes few warps, mostly one


@triton_op("mambavision::layer_norm", mutates_args=())
def layer_norm(x: Tensor, offset: Tensor | None, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """The norm of x + offset, contiguous."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    _launch(x, None, dense(offset), out, None, None, eps)
    return out


@triton_op("mambavision::layer_norm_and_sum", mutates_args=())
def layer_norm_and_sum(x: Tensor, shift: Tensor, eps: float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The norm of x, and x + shift, both contiguous."""
    x = x.contiguous()
    out, shifted = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    _launch(x, None, None, out, shift.contiguous(), shifted, eps)
    return out, shifted


@triton_op("mambavision::layer_norm_of_sum_", mutates_args={"x"})
def layer_norm_of_sum_(
    x: Tensor, share: Tensor, offset: Tensor | None, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Add a share to x, which has no gaps, in place; returns the norm of the sum + offset, contiguous."""
    out = torch.empty_like(x, dtype=dtype)
    _launch(x, share.contiguous(), dense(offset), out, None, None, eps)
    return out


def _launch(
    x: Tensor,
    share: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
    shift: Tensor | None,
    shifted: Tensor | None,
    eps: float,
) -> None:
    channels = x.shape[-1]
    rows = x.numel() // channels
    if rows:
        columns = triton.next_power_of_2(channels)
        warps = min(max(1, columns // COLUMNS_OF_A_WARP), 16)
        launcher(layer_norm_kernel)[(triton.cdiv(rows, ROWS),)](
            x, share, offset, out, shift, shifted, rows, channels, eps,
            BLOCK_M=ROWS, BLOCK_N=columns, HAS_SHARE=share is not None, HAS_OFFSET=offset is not None,
            HAS_SHIFT=shift is not None, num_warps=warps,
        )  # fmt: skip
