"""The residual sum with its layer norm, and the norm alone, as operators that PyTorch knows, with their gradients.

A compiler makes three kernels of the norm's backward, clears memory for two of them, and adds the gradients of the
stream anew for each branch; here one kernel passes over the maps, and a small one sums what its programs add to the
gradients of the parameters. Imported only where it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from mambavision.ops.add_layer_norm.kernels import add_layer_norm_backward_kernel, add_layer_norm_kernel
from mambavision.ops.column_sums import column_sums
from mambavision.ops.launch import dense, launcher
from mambavision.ops.tiles import common_unit

BLOCK_BYTES = 4096  # of the stream that a program has at once
WARPS = 4
BACKWARD_BYTES = {2: 4096, 4: 2048}  # by the bytes of an element: there is room for the sums beside them
BACKWARD_WARPS = 2  # few, since all that share a row wait for its sums
STAGES = 3  # steps of the backward whose loads are under way at once
PROGRAMS = 528  # of the backward: four for each multiprocessor of a large GPU, and few sums


@triton_op("mambavision::affine_layer_norm", mutates_args=())
def affine_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, contiguous, and what the backward needs of the rows: mean and 1 / deviation, float32 (rows,)."""
    return _forward(x, None, None, None, None, weight, bias, None, eps, dtype)


@triton_op("mambavision::add_layer_norm", mutates_args=())
def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    shift: Tensor | None,
    gamma: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, its norm, both contiguous, and what the backward needs of the rows."""
    kind = torch.promote_types(x.dtype, branch.dtype)
    kind = kind if gamma is None else torch.promote_types(kind, gamma.dtype)
    total = torch.empty(x.shape, dtype=kind, device=x.device)
    return total, *_forward(x, branch, shift, gamma, scale, weight, bias, total, eps, dtype)


@triton_op("mambavision::add_layer_norm_backward", mutates_args=())
def add_layer_norm_backward(
    grad_total: Tensor | None,
    grad_y: Tensor,
    total: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rate: Tensor,
    has_shift: bool,
    x_type: torch.dtype,
    branch_type: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and branch, in these types, and sums for those of the parameters, float32 (2 to 4, channels).

    The branch's is empty where it is that of x. The sums are the gradients of weight and bias, of gamma but for the
    shift, and of the shift but for gamma, the latter where there is one. Without `grad_total` there was no branch.
    """
    channels, rows, device = total.shape[-1], mean.shape[0], total.device
    kinds = 2 + (gamma is not None) + has_shift
    grad_x = torch.empty(total.shape, dtype=x_type, device=device)
    apart = gamma is not None or scale is not None
    grad_branch = torch.empty(total.shape if apart else (0,), dtype=branch_type, device=device)
    if rows == 0:
        return grad_x, grad_branch, torch.zeros((kinds, channels), dtype=torch.float32, device=device)
    block_bytes = BACKWARD_BYTES[total.element_size()]
    block, settings = _settings(total, block_bytes, BACKWARD_WARPS, grad_total is not None, has_shift, gamma, scale)
    steps = triton.cdiv(rows, block * PROGRAMS)
    programs = triton.cdiv(rows, block * steps)
    parts = torch.empty((programs, kinds, channels), dtype=torch.float32, device=device)
    launcher(add_layer_norm_backward_kernel)[(programs,)](
        dense(grad_total), grad_y.contiguous(), total, dense(branch), dense(gamma), dense(scale),
        weight.contiguous(), mean, rate, grad_x, grad_branch, parts,
        rows, rows // total.shape[0], channels // settings["UNIT"], steps,
        STAGES=STAGES, **settings,
    )  # fmt: skip
    return grad_x, grad_branch, column_sums(parts)


def _forward(
    x: Tensor,
    branch: Tensor | None,
    shift: Tensor | None,
    gamma: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    total: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill `total`; the norm and the rows' numbers."""
    channels = x.shape[-1]
    rows = x.numel() // channels
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rate = (torch.empty((rows,), dtype=torch.float32, device=x.device) for _ in range(2))
    if rows:
        block, settings = _settings(x, BLOCK_BYTES, WARPS, branch is not None, shift is not None, gamma, scale)
        launcher(add_layer_norm_kernel)[(triton.cdiv(rows, block),)](
            x.contiguous(), dense(branch), dense(shift), dense(gamma), dense(scale), weight.contiguous(),
            bias.contiguous(), total, out, mean, rate,
            rows, rows // x.shape[0], channels // settings["UNIT"], eps, **settings,
        )  # fmt: skip
    return out, mean, rate


def _settings(
    stream: Tensor,
    block_bytes: int,
    warps: int,
    has_branch: bool,
    has_shift: bool,
    gamma: Tensor | None,
    scale: Tensor | None,
) -> tuple[int, dict[str, Any]]:
    """The rows of a block, and what both passes over the maps are compiled for."""
    channels = int(stream.shape[-1])  # what follows would be long to trace for a symbol
    columns = triton.next_power_of_2(channels)
    block = max(1, block_bytes // (columns * stream.element_size()))
    return block, {
        "UNIT": common_unit(channels),
        "BLOCK_M": block,
        "BLOCK_N": columns,
        "HAS_BRANCH": has_branch,
        "HAS_SHIFT": has_shift,
        "HAS_GAMMA": gamma is not None,
        "HAS_SCALE": scale is not None,
        "num_warps": max(warps, columns // 512),
    }


def _setup_norm(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, *_ = inputs
    _, mean, rate = output
    ctx.save_for_backward(x, weight, mean, rate)
    ctx.bias_type = bias.dtype
    ctx.mark_non_differentiable(mean, rate)


def _differentiate_norm(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mean, rate = ctx.saved_tensors
    grad_x, _, sums = add_layer_norm_backward(
        None, grad_y, x.contiguous(), None, None, None, weight, mean, rate, False, x.dtype, x.dtype
    )
    return grad_x, sums[0].to(weight.dtype), sums[1].to(ctx.bias_type), None, None


def _setup_sum(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, branch, shift, gamma, scale, weight, bias, *_ = inputs
    total, _, mean, rate = output
    ctx.save_for_backward(None if gamma is None else branch, shift, gamma, scale, weight, total, mean, rate)
    ctx.types, ctx.bias_type = (x.dtype, branch.dtype), bias.dtype
    ctx.mark_non_differentiable(mean, rate)


def _differentiate_sum(ctx: Any, grad_total: Tensor, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    branch, shift, gamma, scale, weight, total, mean, rate = ctx.saved_tensors
    types = x_type, branch_type = ctx.types
    same = gamma is None and scale is None  # then one gradient, in the wider type, is that of both
    if same:
        types = (torch.promote_types(x_type, branch_type), branch_type)
    grad_x, grad_branch, sums = add_layer_norm_backward(
        grad_total, grad_y, total, branch, gamma, scale, weight, mean, rate, shift is not None, *types
    )
    if same:
        grad_x, grad_branch = grad_x.to(x_type), grad_x.to(branch_type)
    grad_gamma = None if gamma is None else sums[2]
    grad_shift = None if shift is None else sums[-1]
    if grad_gamma is not None and grad_shift is not None:
        grad_gamma, grad_shift = grad_gamma + shift * grad_shift, gamma * grad_shift
    return (
        grad_x,
        grad_branch,
        None if grad_shift is None else grad_shift.to(shift.dtype),
        None if grad_gamma is None else grad_gamma.to(gamma.dtype),
        None,
        sums[0].to(weight.dtype),
        sums[1].to(ctx.bias_type),
        None,
        None,
    )


affine_layer_norm.register_autograd(_differentiate_norm, setup_context=_setup_norm)
add_layer_norm.register_autograd(_differentiate_sum, setup_context=_setup_sum)
