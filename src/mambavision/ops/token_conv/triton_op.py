"""The convolution over tokens as an operator that PyTorch knows, with its gradient. Imported only where it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from mambavision.ops.column_sums import column_sums
from mambavision.ops.launch import launcher
from mambavision.ops.tiles import common_unit
from mambavision.ops.token_conv.kernels import token_conv_backward_kernel, token_conv_kernel

BLOCK_M, BLOCK_N, WARPS = 32, 64, 2
# Of the backward: tokens that a thread walks along, which divide the networks' windows of 49 and 196, and how many
# before their use they are loaded; runs and channels of a program, and its warps.
RUN, AHEAD = 7, 7
BACKWARD_M, BACKWARD_N, BACKWARD_WARPS = 8, 32, 2
PROGRAMS = 1024  # enough for a large GPU, and few sums of the weight's gradient


@triton_op("mambavision::token_conv", mutates_args=())
def token_conv(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU(conv(x)), (windows, length, channels), contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    windows, length, channels = x.shape
    rows = windows * length
    if rows:
        x = _rows(x)
        unit = common_unit(channels, x.stride(0))
        launcher(token_conv_kernel)[(triton.cdiv(channels, BLOCK_N) * triton.cdiv(rows, BLOCK_M),)](
            x, weight.contiguous(), out, rows, length, channels, x.stride(0) // unit, channels // unit,
            UNIT=unit, KERNEL=weight.shape[-1], BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=WARPS,
        )  # fmt: skip
    return out


@triton_op("mambavision::token_conv_backward", mutates_args=())
def token_conv_backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, contiguous, and of the weight, float32."""
    windows, length, channels = x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = windows * length
    if rows == 0:
        return grad_x, torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
    runs, tiles = windows * triton.cdiv(length, RUN), triton.cdiv(channels, BACKWARD_N)
    steps = max(1, runs * tiles // (BACKWARD_M * PROGRAMS))
    groups = triton.cdiv(runs, steps * BACKWARD_M)
    parts = torch.empty((groups, *weight.shape), dtype=torch.float32, device=x.device)
    x, grad_y = _rows(x), _rows(grad_y)
    launcher(token_conv_backward_kernel)[(tiles * groups,)](
        x, weight.contiguous(), grad_y, grad_x, parts, runs, length, steps,
        CHANNELS=channels, X_ROW=x.stride(0), GRAD_Y_ROW=grad_y.stride(0), KERNEL=weight.shape[1],
        RUN=RUN, AHEAD=AHEAD, BLOCK_M=BACKWARD_M, BLOCK_N=BACKWARD_N, num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return grad_x, column_sums(parts)


def _rows(tensor: Tensor) -> Tensor:
    """(windows, length, channels) as (rows, channels) with neighbours side by side; a view where the strides allow."""
    return (tensor if tensor.stride(2) == 1 else tensor.contiguous()).reshape(-1, tensor.shape[2])


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:  # noqa: ARG001  (PyTorch's signature)
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight = token_conv_backward(grad_y, x, weight)
    return grad_x, grad_weight.to(weight.dtype)


token_conv.register_autograd(_differentiate, setup_context=_setup_context)
