"""The Triton kernels as operators that PyTorch knows: shapes for tracing, gradients, launches.

Imported only where the backend runs (see `mambavision.ops.selective_scan`), since Triton is not everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from mambavision.ops.launch import dense, launcher
from mambavision.ops.selective_scan import kernels

# Tokens whose loads are issued together: the first that divides the length, for loads without a mask, or the first.
# Windows of 14 x 14 and 7 x 7 tokens are walked a seventh faster by 7.
GROUPS = (8, 7)
SAVED_GROUP = 4  # the same in training: the states before each such group are saved for the backward
AHEAD = 32  # chunks whose loads `stitch_kernel` issues together, at most
STITCH_BLOCK = 128
WARP = 32
MIN_CHUNK = 16  # tokens; shorter chunks cost more in stitching than they gain in walking side by side
WARPS_WANTED = 1024  # two for each of the four schedulers of a large GPU's multiprocessors


class Cut(NamedTuple):
    """How the work is cut: channels a program, tokens a group, tokens a chunk, and the counts that follow."""

    block: int
    blocks: int
    group: int
    chunk: int
    chunks: int


def cut(batch: int, length: int, channels: int, *, training: bool = False) -> Cut:
    """Chunks only where whole sequences would leave most of a large GPU idle: they double the exponentials.

    Whole sequences are walked by half a warp of channels, two threads each, where a thread for each would be less than
    two warps a scheduler: with several it waits less. Training keeps one thread a channel, whose backward sums over the
    channels by whole warps.

    Args:
        batch: sequences.
        length: tokens in each.
        channels: of each.
        training: whether states are saved for the backward, or it runs.
    """
    group = SAVED_GROUP if training else next((group for group in GROUPS if length % group == 0), GROUPS[0])
    blocks = -(-channels // WARP)
    chunks = min(WARPS_WANTED // max(1, batch * blocks), length // MIN_CHUNK)
    if chunks < 4:
        chunks = 1
    chunk = -(-length // (chunks * group)) * group
    block = WARP // 2 if chunks == 1 and not training and batch * blocks < WARPS_WANTED else WARP
    return Cut(block, -(-channels // block), group, chunk, -(-length // chunk))


def selective_scan_triton(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, dt_bias: Tensor | None = None
) -> Tensor:
    """Scan by GPU kernels; arguments and result as in `mambavision.ops.selective_scan`."""
    inputs = (x, dt, A, B, C, D, dt_bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        y, _ = scan_for_training(*inputs)
    else:
        y = scan(*inputs)
    assert isinstance(y, Tensor)
    return y


@triton_op("mambavision::selective_scan", mutates_args=())
def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> Tensor:
    """Y alone, (batch, length, channels), contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _walk(x, dt, A, B, C, D, dt_bias, y, None)
    return y


@triton_op("mambavision::selective_scan_", mutates_args={"x"})
def scan_(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> None:
    """Replace x, whose channels lie side by side, by y. No thread reads of x what another has written."""
    _walk(x, dt, A, B, C, D, dt_bias, x, None)


@triton_op("mambavision::selective_scan_for_training", mutates_args=())
def scan_for_training(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Y, and the states before each group of tokens for the backward: float32 (batch, groups, state, channels)."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, length, channels = x.shape
    saved = torch.empty((batch, -(-length // SAVED_GROUP), A.shape[1], channels), dtype=torch.float32, device=x.device)
    _walk(x, dt, A, B, C, D, dt_bias, y, saved)
    return y, saved


@triton_op("mambavision::selective_scan_backward", mutates_args=())
def scan_backward(
    grad_y: Tensor,
    saved: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and dt in their types, and in float32 those that several inputs share.

    Of B and C: (batch, length, 2, state). Of A, D and dt_bias: (state + 2, channels), one below the other.
    """
    batch, length, channels = x.shape
    state = A.shape[1]
    cuts = cut(batch, length, channels, training=True)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_dt = torch.empty(dt.shape, dtype=dt.dtype, device=x.device)
    grad_BC = _float32(x, cuts.blocks, batch, length, 2, state)
    grad_constants = _float32(x, batch * cuts.chunks, state + 2, channels)
    if batch > 0:
        A, D, dt_bias = _parameters(A, D, dt_bias)
        x, dt, grad_y = (_with_unit_stride(tensor) for tensor in (x, dt, grad_y))
        B, C = _with_vector_rows(B, C)
        strides = [tensor.stride(0) for tensor in (x, dt, B, C, grad_y)]
        rows = [tensor.stride(1) for tensor in (x, dt, B, C, grad_y)]
        fixed = dict(zip(("x_row", "dt_row", "B_row", "C_row", "grad_y_row"), rows, strict=True))
        settings = fixed | _settings(x, A, B, cuts, D, dt_bias)
        settings["LEVELS"] = (2 * SAVED_GROUP * state // settings["WIDTH"]).bit_length() - 1
        starts = ends = sums = saved  # read or written only where there are chunks
        grid = (cuts.blocks * batch, cuts.chunks)
        outputs = (grad_x, grad_dt, grad_BC, grad_constants)
        if cuts.chunks > 1:
            ends, sums = _float32(x, batch, cuts.chunks, state, channels), _float32(x, batch, cuts.chunks, channels)
            launcher(kernels.backward_kernel)[grid](
                x, dt, A, B, C, D, dt_bias, grad_y, saved, starts, *outputs, ends, sums,
                *strides, length, channels, cuts.chunk, **settings, STARTS=False, ENDS=True, num_warps=1,
            )  # fmt: skip
            starts = _stitch(A, ends, sums, reverse=True)
        launcher(kernels.backward_kernel)[grid](
            x, dt, A, B, C, D, dt_bias, grad_y, saved, starts, *outputs, ends, sums,
            *strides, length, channels, cuts.chunk, **settings, STARTS=cuts.chunks > 1, ENDS=False, num_warps=1,
        )  # fmt: skip
    return grad_x, grad_dt, grad_BC.sum(0), grad_constants.sum(0)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved, *inputs = ctx.saved_tensors
    grad_x, grad_dt, grad_BC, grad_constants = scan_backward(grad_y, saved, *inputs)
    *_, A, B, C, D, dt_bias = inputs
    return (
        grad_x,
        grad_dt,
        grad_constants[:-2].t().to(A.dtype),
        grad_BC[:, :, 0].to(B.dtype),
        grad_BC[:, :, 1].to(C.dtype),
        None if D is None else grad_constants[-2].to(D.dtype),
        None if dt_bias is None else grad_constants[-1].to(dt_bias.dtype),
    )


scan_for_training.register_autograd(_differentiate, setup_context=_setup_context)


def _walk(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    y: Tensor,
    saved: Tensor | None,
) -> None:
    """Fill y, and `saved` where it is given."""
    batch, length, channels = x.shape
    if batch == 0:
        return
    A, D, dt_bias = _parameters(A, D, dt_bias)
    x, dt = _with_unit_stride(x), _with_unit_stride(dt)
    B, C = _with_vector_rows(B, C)
    strides = [tensor.stride(0) for tensor in (x, dt, B, C, y)]
    rows = [tensor.stride(1) for tensor in (x, dt, B, C, y)]
    settings = dict(zip(("x_row", "dt_row", "B_row", "C_row", "y_row"), rows, strict=True))
    cuts = cut(batch, length, channels, training=saved is not None)
    settings |= _settings(x, A, B, cuts, D, dt_bias)
    # Results in 16 bits hide a coarser step; gradients of A, in float32, would not.
    settings["SHORT"] = saved is None and x.element_size() == 2 and dt.element_size() == 2
    starts = ends = sums = y  # read or written only where there are chunks
    states = y if saved is None else saved
    grid = (cuts.blocks * batch, cuts.chunks)
    if cuts.chunks > 1:
        ends = _float32(x, batch, cuts.chunks, A.shape[1], channels)
        sums = _float32(x, batch, cuts.chunks, channels)
        launcher(kernels.walk_kernel)[grid](
            x, dt, A, B, C, D, dt_bias, y, starts, states, ends, sums,
            *strides, length, channels, cuts.chunk, **settings, STARTS=False, SAVE=False, ENDS=True, num_warps=1,
        )  # fmt: skip
        starts = _stitch(A, ends, sums, reverse=False)
    launcher(kernels.walk_kernel)[grid](
        x, dt, A, B, C, D, dt_bias, y, starts, states, ends, sums,
        *strides, length, channels, cuts.chunk,
        **settings, STARTS=cuts.chunks > 1, SAVE=saved is not None, ENDS=False, num_warps=1,
    )  # fmt: skip


def _stitch(A: Tensor, ends: Tensor, sums: Tensor, *, reverse: bool) -> Tensor:
    """The state that enters each chunk, (batch, chunks, state, channels)."""
    batch, chunks, state, channels = ends.shape
    entering = torch.empty_like(ends)
    ahead = min(AHEAD, triton.next_power_of_2(chunks))
    launcher(kernels.stitch_kernel)[(triton.cdiv(state * channels, STITCH_BLOCK), batch)](
        A, ends, sums, entering, chunks, channels, N=state, BLOCK=STITCH_BLOCK, AHEAD=ahead, REVERSE=reverse
    )
    return entering


def _settings(x: Tensor, A: Tensor, B: Tensor, cuts: Cut, D: Tensor | None, dt_bias: Tensor | None) -> dict[str, Any]:
    """The compile-time constants that both directions share."""
    _, length, channels = x.shape
    state = A.shape[1]
    paired = B.element_size() == 2
    return {
        "N": state,
        "WIDTH": min(4, state // 2) if paired else min(4, state),  # 16 bytes a load at most
        "PAIRED": paired,
        "BLOCK": cuts.block,
        "GROUP": cuts.group,
        "WHOLE": channels % cuts.block == 0,
        "FULL": length % cuts.group == 0,
        "HAS_D": D is not None,
        "HAS_BIAS": dt_bias is not None,
    }


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _parameters(A: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As the kernels read them, without gaps."""
    return A.contiguous(), dense(D), dense(dt_bias)


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _with_vector_rows(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one type, the wider, with rows that begin where the kernels' vector loads can, of 16 bytes at most.

    Rows that lie elsewhere, as in a projection whose steps take 20 columns, would be read in pieces, at half the speed.
    """
    wide = torch.promote_types(B.dtype, C.dtype)
    B, C = B.to(wide), C.to(wide)
    vector = min(16 // B.element_size(), B.shape[2])
    if all(
        tensor.stride(2) == 1
        and all(stride % vector == 0 for stride in tensor.stride()[:2])
        and tensor.storage_offset() % vector == 0
        for tensor in (B, C)
    ):
        return B, C
    both = torch.cat([B, C], dim=2)
    return both[..., : B.shape[2]], both[..., B.shape[2] :]
