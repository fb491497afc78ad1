"""The MLP's kernels and the library's products around them as an operator that PyTorch knows, with its gradient.

Imported only where the backend runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from mambavision.ops.launch import launcher
from mambavision.ops.mlp.kernels import hidden_backward_kernel, hidden_kernel
from mambavision.ops.tiles import Tile, common_unit, is_large, small_tiles, that_fit

LARGE = Tile(128, 128, 64, 8, 3)
GROUP = 8


@triton_op("mambavision::mlp", mutates_args=())
def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the hidden layer (rows, hidden) before and behind its GELU."""
    x2 = x.reshape(-1, x.shape[-1])
    rows, columns = x2.shape[0], weight1.shape[0]
    before, hidden = (torch.empty((rows, columns), dtype=x.dtype, device=x.device) for _ in range(2))
    if rows:
        inner = x2.shape[1]
        _launch(hidden_kernel, (x2.contiguous(), weight1.contiguous(), bias1, before, hidden), rows, columns, inner)
    return torch.addmm(bias2, hidden, weight2.t()).view(x.shape), before, hidden


@triton_op("mambavision::mlp_backward", mutates_args=())
def mlp_backward(
    grad_y: Tensor, x: Tensor, weight1: Tensor, weight2: Tensor, before: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight1, bias1 (float32), weight2 and bias2 (float32)."""
    grad_y2 = grad_y.reshape(-1, grad_y.shape[-1]).contiguous()
    rows, columns = before.shape
    grad_before = torch.empty((rows, columns), dtype=before.dtype, device=before.device)
    tiles = triton.cdiv(rows, _tile(rows, columns, before).rows)
    grad_bias1 = torch.empty((tiles, columns), dtype=torch.float32, device=before.device)
    if rows:
        arguments = (grad_y2, weight2.contiguous(), before, grad_before, grad_bias1)
        _launch(hidden_backward_kernel, arguments, rows, columns, grad_y2.shape[1])
    grad_weight1 = grad_before.t() @ x.reshape(-1, x.shape[-1])
    grad_bias2 = grad_y2.sum(0, dtype=torch.float32)
    return (grad_before @ weight1).view(x.shape), grad_weight1, grad_bias1.sum(0), grad_y2.t() @ hidden, grad_bias2


def _tile(rows: int, columns: int, like: Tensor) -> Tile:
    tiles = [LARGE] if is_large(rows, columns) else small_tiles(rows, columns)
    return that_fit([*tiles, small_tiles(rows, columns)[-1]], like.element_size(), like.device)[0]


def _launch(kernel: Any, tensors: tuple[Tensor, ...], rows: int, columns: int, inner: int) -> None:
    tile = _tile(rows, columns, tensors[0])
    unit = common_unit(columns, inner)
    launcher(kernel)[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
        *tensors, rows, columns // unit, inner // unit,
        UNIT=unit, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.inner, GROUP=GROUP,
        EVEN_K=inner % tile.inner == 0, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


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
