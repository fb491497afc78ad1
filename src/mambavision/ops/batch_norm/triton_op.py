"""The batch norm's kernels as an operator that PyTorch knows, with its gradient. Imported only where it runs."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from mambavision.ops.batch_norm import kernels
from mambavision.ops.launch import dense, launcher
from mambavision.ops.map_layout import new_map

BLOCK_M, BLOCK_N = 32, 128
SUM_M, STAGES = 16, 4  # of the kernels that sum: rows a step, steps whose loads are under way
PROGRAMS = 528  # that sum: four for each multiprocessor of a large GPU, and few sums to merge
MERGE_P, MERGE_C = 256, 8


class Plan(NamedTuple):
    """How a map is seen and cut: see `kernels`."""

    channels: int
    fold: int
    columns: int
    rows: int
    picture_rows: int
    tiles: int
    steps: int
    groups: int


def plan(batch: int, channels: int, pixels: int) -> Plan:
    """Of a map of so many pictures, channels, and pixels a picture."""
    # A symbol stays one: a network of many picture sizes would be compiled for each.
    fold = 1 if isinstance(pixels, torch.SymInt) else gcd(pixels, BLOCK_N // gcd(channels, BLOCK_N))
    columns = fold * channels
    rows = batch * pixels // fold
    tiles = triton.cdiv(columns, BLOCK_N)
    blocks = triton.cdiv(rows, SUM_M)
    steps = max(1, triton.cdiv(blocks * tiles, PROGRAMS))
    return Plan(channels, fold, columns, rows, pixels // fold, tiles, steps, triton.cdiv(blocks, steps))


@triton_op("mambavision::batch_norm", mutates_args=())
def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, residual: Tensor | None, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, channels-last, and float32 mean and biased variance."""
    x, weight, bias, scale = _channels_last(x), weight.contiguous(), bias.contiguous(), dense(scale)
    batch, channels, height, width = x.shape
    how = plan(batch, channels, height * width)
    partial, mean, variance = _sums(how, x.device)
    launcher(kernels.statistics_kernel)[(how.groups * how.tiles,)](
        x, partial, how.rows, how.steps,
        COLUMNS=how.columns, BLOCK_M=SUM_M, BLOCK_N=BLOCK_N, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    launcher(kernels.merge_statistics_kernel)[(triton.cdiv(channels, MERGE_C),)](
        partial, mean, variance, how.rows, how.groups, how.steps * SUM_M,
        CHANNELS=channels, FOLD=how.fold, BLOCK_P=MERGE_P, BLOCK_C=MERGE_C, num_warps=8,
    )  # fmt: skip
    kind = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = new_map(*x.shape, like=x, dtype=kind)
    launcher(kernels.apply_kernel)[(triton.cdiv(how.rows, BLOCK_M) * how.tiles,)](
        x, weight, bias, mean, variance, scale, None if residual is None else _channels_last(residual), out,
        how.rows, how.picture_rows, eps, CHANNELS=channels, COLUMNS=how.columns, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        HAS_SCALE=scale is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=activation, num_warps=4,
    )  # fmt: skip
    return out, mean, variance


@triton_op("mambavision::batch_norm_backward", mutates_args=())
def batch_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, channels-last, and of weight and bias, float32."""
    x, grad_y = _channels_last(x), _channels_last(grad_y)
    weight, bias, scale = weight.contiguous(), bias.contiguous(), dense(scale)
    batch, channels, height, width = x.shape
    how = plan(batch, channels, height * width)
    partial, grad_weight, grad_bias = _sums(how, x.device)
    what = {"HAS_SCALE": scale is not None, "ACTIVATION": activation, "num_warps": 4}
    tile = {"CHANNELS": channels, "COLUMNS": how.columns, "BLOCK_N": BLOCK_N}
    launcher(kernels.sums_kernel)[(how.groups * how.tiles,)](
        x, grad_y, weight, bias, mean, variance, scale, partial, how.rows, how.steps, how.picture_rows, eps,
        BLOCK_M=SUM_M, STAGES=STAGES, **tile, **what,
    )  # fmt: skip
    launcher(kernels.merge_sums_kernel)[(triton.cdiv(channels, MERGE_C),)](
        partial, variance, grad_weight, grad_bias, how.groups, eps,
        CHANNELS=channels, FOLD=how.fold, BLOCK_P=MERGE_P, BLOCK_C=MERGE_C, num_warps=8,
    )  # fmt: skip
    grad_x = new_map(*x.shape, like=x, dtype=x.dtype)
    launcher(kernels.gradient_kernel)[(triton.cdiv(how.rows, BLOCK_M) * how.tiles,)](
        x, grad_y, weight, bias, mean, variance, grad_weight, grad_bias, scale, grad_x,
        how.rows, how.picture_rows, batch * height * width, eps, BLOCK_M=BLOCK_M, **tile, **what,
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias


def _sums(how: Plan, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the groups' sums, and for two numbers of each channel."""
    partial = torch.empty((how.groups, 2, how.columns), dtype=torch.float32, device=device)
    first, second = (torch.empty((how.channels,), dtype=torch.float32, device=device) for _ in range(2))
    return partial, first, second


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, scale, residual, ctx.eps, ctx.activation = inputs
    _, mean, variance = output
    ctx.save_for_backward(x, weight, bias, scale, mean, variance)
    ctx.residual_type = None if residual is None else residual.dtype
    ctx.mark_non_differentiable(mean, variance)


def _differentiate(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, *others = ctx.saved_tensors
    grad_y = _channels_last(grad_y)
    # A compiler would sum the residuals' gradients anew for every kernel that reads them; what is seen by its strides
    # it writes first. (A part of something else is there already, and some compilers would forget where it begins.)
    if grad_y.storage_offset() == 0:
        grad_y = grad_y.as_strided(grad_y.shape, grad_y.stride())
    grad_x, grad_weight, grad_bias = batch_norm_backward(grad_y, x, weight, bias, *others, ctx.eps, ctx.activation)
    grad_residual = None if ctx.residual_type is None else grad_y.to(ctx.residual_type)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, grad_residual, None, None


batch_norm.register_autograd(_differentiate, setup_context=_setup_context)
