"""The MLP as an operator that PyTorch knows, with a gradient of fewer passes over the hidden layer than PyTorch's.

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

from mambavision.ops.launch import launcher
from mambavision.ops.mlp.kernels import gelu_backward_kernel
from mambavision.ops.tiles import common_unit

BLOCK_M, BLOCK_N = 64, 64


@triton_op("mambavision::mlp", mutates_args=())
def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the hidden layer (rows, hidden) before and behind its GELU."""
    before = torch.addmm(bias1, x.reshape(-1, x.shape[-1]), weight1.t())
    hidden = F.gelu(before)
    return torch.addmm(bias2, hidden, weight2.t()).view(x.shape), before, hidden


@triton_op("mambavision::mlp_backward", mutates_args=())
def mlp_backward(
    grad_y: Tensor, x: Tensor, weight1: Tensor, weight2: Tensor, before: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight1, bias1 (float32), weight2 and bias2 (float32)."""
    grad_y2 = grad_y.reshape(-1, grad_y.shape[-1])
    rows, columns = before.shape
    grad_before = grad_y2 @ weight2  # that of the hidden layer, at first
    blocks = triton.cdiv(rows, BLOCK_M)
    grad_bias1 = torch.empty((blocks, columns), dtype=torch.float32, device=before.device)
    if rows:
        unit = common_unit(columns)
        launcher(gelu_backward_kernel)[(triton.cdiv(columns, BLOCK_N), blocks)](
            grad_before, before, grad_bias1, rows, columns // unit,
            UNIT=unit, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4,
        )  # fmt: skip
    grad_weight1 = grad_before.t() @ x.reshape(-1, x.shape[-1])
    grad_bias2 = grad_y2.sum(0, dtype=torch.float32)
    return (grad_before @ weight1).view(x.shape), grad_weight1, grad_bias1.sum(0), grad_y2.t() @ hidden, grad_bias2


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    x, weight1, bias1, weight2, bias2 = inputs
    ctx.save_for_backward(x, weight1, weight2, *output[1:])
    ctx.types = bias1.dtype, bias2.dtype
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    grad_x, grad_weight1, grad_bias1, grad_weight2, grad_bias2 = mlp_backward(grad_y, *ctx.saved_tensors)
    type1, type2 = ctx.types
    return grad_x, grad_weight1, grad_bias1.to(type1), grad_weight2, grad_bias2.to(type2)


mlp.register_autograd(_differentiate, setup_context=_setup_context)
