"""Attention inside windows by the kernel for Hopper GPUs, as an operator that PyTorch knows."""

from __future__ import annotations

import ctypes
import math
from functools import partial

import torch
from torch import Tensor
from torch.library import custom_op

from mambavision.ops import launch
from mambavision.ops.hopper.availability import BYTES, fault, processors
from mambavision.ops.hopper.plan import ALIGNMENT, GROUP, LINE, Definitions
from mambavision.ops.precision import HALVES

LEAST_TOKENS, MOST_TOKENS = 65, 208  # of a window: fewer are less than a tile, more have no room in registers
# Channels of a head, of which it has a multiple of HEAD_UNIT: for narrower ones the compiler has products wait for each
# other, wider ones are no line.
NARROWEST_HEAD, WIDEST_HEAD, HEAD_UNIT = 24, 64, 8
MOST_ITEMS = 2**31 - 2**20  # heads of all windows; they are counted in 32 bits, beyond the last by a round
STEP = 16  # keys, of which a multiple is multiplied
STAGES, TEAMS = 2, 2


def serves(qkv: Tensor, num_heads: int) -> bool:
    """Whether the attention of many windows, on whatever device, should be computed here."""
    windows, length, inner = qkv.shape
    width = inner // (3 * num_heads)
    return (
        qkv.is_cuda
        and qkv.dtype in HALVES
        and fault(launch.index_of(qkv.device)) is None  # before what a compiler would guard elsewhere too
        and not (torch.is_grad_enabled() and qkv.requires_grad)
        and LEAST_TOKENS <= length <= MOST_TOKENS
        and NARROWEST_HEAD <= width <= WIDEST_HEAD
        and width % HEAD_UNIT == 0
        and windows * num_heads < MOST_ITEMS
    )


def attention_definitions(length: int, heads: int, width: int, dtype: torch.dtype) -> Definitions:
    """The constants of `attention.cu`.

    Args:
        length: tokens of a window.
        heads: of the attention.
        width: channels of a head.
        dtype: of all of them.
    """
    steps = -(-length // STEP)
    return (
        ("LENGTH", length),
        ("KEYS", steps * STEP),
        ("FIRST", -(-steps // 2) * STEP),
        ("HEADS", heads),
        ("WIDTH", width),
        ("BFLOAT16", int(dtype == torch.bfloat16)),
        ("STAGES", STAGES),
        ("TEAMS", TEAMS),
        ("LINE", LINE),
    )


def shared_bytes(defined: Definitions) -> int:
    """Shared memory of a block that is asked for at its launch, by the constants of `attention.cu`."""
    values = dict(defined)
    return values["STAGES"] * 3 * values["KEYS"] * values["LINE"] + ALIGNMENT


@custom_op("mambavision::attention_hopper", mutates_args=())
def attention(qkv: Tensor, num_heads: int, scale: float) -> Tensor:
    """Arguments and result as in `mambavision.ops.window_attention`, in 16 bits; contiguous. `scale` is positive."""
    from mambavision.ops.hopper import build

    if not scale > 0:
        raise ValueError(f"scale must be positive for the kernel, which looks for the largest score, got {scale}.")
    windows, length, inner = qkv.shape
    width = inner // (3 * num_heads)
    out = qkv.new_empty((windows, length, inner // 3))
    items = windows * num_heads
    if items == 0:
        return out
    qkv = qkv.contiguous()
    if qkv.data_ptr() % BYTES:
        qkv = qkv.clone()
    defined = attention_definitions(length, num_heads, width, qkv.dtype)
    shared, device = shared_bytes(defined), qkv.device.index
    compiled = partial(build.kernel, "attention", defined, shared, device)
    if launch.is_precompiling():
        launch.note(("hopper attention", defined, qkv.device), compiled, at_once=True)
        return out
    stream = torch.cuda.current_stream(qkv.device).cuda_stream
    with build.on(device):
        arguments = [
            build.heads_map(qkv.data_ptr(), (width, 3 * num_heads, length, windows), dict(defined)["KEYS"], qkv.dtype),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_float(scale * math.log2(math.e)),
            ctypes.c_int(items),
        ]
        build.start(compiled(), min(processors(device), items), GROUP * TEAMS, shared, stream, arguments)
    return out


@attention.register_fake
def _(qkv: Tensor, _heads: int, _scale: float) -> Tensor:
    windows, length, inner = qkv.shape
    return qkv.new_empty((windows, length, inner // 3))
