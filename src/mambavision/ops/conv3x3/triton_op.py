"""The fused 3x3 convolution's kernel as an operator that PyTorch knows. Imported only where the backend runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.library import triton_op

from mambavision.ops.conv3x3.kernels import conv3x3_kernel, finish_kernel
from mambavision.ops.launch import launcher
from mambavision.ops.tiles import Tile, choose, common_unit, is_large, small_tiles

LIBRARY = Tile(0, 0, 0, 0, 0)  # cuDNN's convolution, and a kernel for what follows it
FINISH_PIXELS, FINISH_COLUMNS = 32, 128
WIDE_FROM = 192  # channels from which cuDNN's is faster


def candidates(pixels: int, columns: int, channels: int) -> list[Tile]:
    """The tiles worth trying, the likely best first."""
    if not is_large(pixels, columns):
        return [*small_tiles(pixels, columns), LIBRARY]
    rest = columns % 128  # of whole tiles; what is left gets a tile of its own where it is narrow
    if columns < 128 and columns % 64 in (16, 32):
        ours = [Tile(128, 64, 64, 4, 4, columns % 64), Tile(128, 64, 128, 4, 3, columns % 64)]
    elif columns < 256 and rest in (16, 32, 64):
        ours = [Tile(128, 128, 64, 4, 3, rest), Tile(256, 128, 64, 8, 3, rest)]
    else:
        ours = [Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 4)]
    # Neither do tiles fit a number of channels that 16 does not divide.
    return [LIBRARY, *ours] if channels >= WIDE_FROM or columns % 16 else [*ours, LIBRARY]


@triton_op("mambavision::conv3x3", mutates_args=())
def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: int, activation: str
) -> Tensor:
    """act(conv(x) + bias) + residual, channels-last."""
    return launch(x, weight, bias, residual, stride, activation)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    activation: str,
    tile: Tile | None = None,
) -> Tensor:
    """`conv3x3` with a tile chosen for the shape or given."""
    batch, channels, height, width = x.shape
    columns = weight.shape[0]
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    shape = (batch, columns, out_height, out_width)
    pixels = batch * out_height * out_width
    if pixels == 0:
        return x.new_empty(shape)
    if x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    strides = (x.stride(0), x.stride(2), x.stride(3), columns)
    unit = common_unit(*strides)

    def run(tile: Tile) -> Tensor:
        if tile == LIBRARY:
            return _finished(F.conv2d(x, weight, None, stride, 1), bias, residual, activation)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        grid = (triton.cdiv(columns, tile.columns + tile.tail), triton.cdiv(pixels, tile.rows))
        launcher(conv3x3_kernel)[grid](
            x, weight, bias, out if residual is None else residual, out,
            batch, height, width, out_height, out_width, columns, *(step // unit for step in strides),
            UNIT=unit, CHANNELS=channels, STRIDE=stride,
            BLOCK_M=tile.rows, BLOCK_N=tile.columns, TAIL=tile.tail, BLOCK_K=tile.inner, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None, ACTIVATION=activation, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return out

    key = ("conv3x3", pixels, columns, channels, stride, x.dtype, activation, residual is None, x.device)
    return run(tile or choose(key, candidates(pixels, columns, channels), run))


def _finished(out: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    """`out`, channels-last, behind bias, activation and residual, in place."""
    if bias is None and residual is None and activation == "none":
        return out
    out = out.contiguous(memory_format=torch.channels_last)
    columns = out.shape[1]
    pixels = out.numel() // columns
    unit = common_unit(columns)
    launcher(finish_kernel)[(triton.cdiv(columns, FINISH_COLUMNS), triton.cdiv(pixels, FINISH_PIXELS))](
        out, bias, out if residual is None else residual, pixels, columns // unit,
        UNIT=unit, BLOCK_M=FINISH_PIXELS, BLOCK_N=FINISH_COLUMNS, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, ACTIVATION=activation, num_warps=4,
    )  # fmt: skip
    return out
