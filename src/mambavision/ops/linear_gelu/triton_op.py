"""The GELU as an operator that PyTorch knows, whose backward makes the bias's gradient in the same pass.

PyTorch's own reads the hidden layer, of which an MLP has most, once more for it, and evaluates erf for 16 bits.
Imported only where the backend runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.library import triton_op

from mambavision.ops.column_sums import column_sums
from mambavision.ops.launch import launcher
from mambavision.ops.linear_gelu.kernels import gelu_backward_kernel, gelu_kernel
from mambavision.ops.tiles import common_unit

BLOCK = 2048  # elements a program, so that each thread has two loads of 16 bytes under way
BLOCK_M, BLOCK_N = 64, 64


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Arguments and result as in `mambavision.ops.linear_gelu`."""
    y: Tensor = gelu(F.linear(x, weight, bias.detach()), bias)
    return y


@triton_op("mambavision::gelu", mutates_args=())
def gelu(before: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG001  (it is here for its gradient)
    """GELU(before), where `before`, (..., columns), has `bias` in it already."""
    if before.dtype == torch.float32:
        return F.gelu(before)
    before = before.contiguous()
    y = torch.empty(before.shape, dtype=before.dtype, device=before.device)
    if count := before.numel():
        launcher(gelu_kernel)[(triton.cdiv(count, BLOCK),)](before, y, count, BLOCK=BLOCK, num_warps=4)
    return y


@triton_op("mambavision::gelu_backward", mutates_args=())
def gelu_backward(grad_y: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `before`, contiguous, and of the bias, float32."""
    columns = before.shape[-1]
    grad_y, before = (tensor.reshape(-1, columns).contiguous() for tensor in (grad_y, before))
    rows = before.shape[0]
    grad_before = torch.empty((rows, columns), dtype=before.dtype, device=before.device)
    if rows == 0:
        return grad_before, torch.zeros((columns,), dtype=torch.float32, device=before.device)
    blocks, unit = triton.cdiv(rows, BLOCK_M), common_unit(columns)
    parts = torch.empty((blocks, columns), dtype=torch.float32, device=before.device)
    launcher(gelu_backward_kernel)[(blocks * triton.cdiv(columns, BLOCK_N),)](
        grad_y, before, grad_before, parts, rows, columns // unit,
        UNIT=unit, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4,
    )  # fmt: skip
    return grad_before, column_sums(parts)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:  # noqa: ARG001  (PyTorch's signature)
    before, bias = inputs
    ctx.save_for_backward(before)
    ctx.bias_type = bias.dtype


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    (before,) = ctx.saved_tensors
    grad_before, grad_bias = gelu_backward(grad_y, before)
    return grad_before.view(before.shape), grad_bias.to(ctx.bias_type)


gelu.register_autograd(_differentiate, setup_context=_setup_context)
