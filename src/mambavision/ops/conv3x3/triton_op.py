"""The fused 3x3 convolution's kernel as an operator that PyTorch knows. Imported only where the backend runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.library import triton_op

from mambavision.ops.conv3x3.kernels import conv3x3_kernel, finish_kernel
from mambavision.ops.hopper import product_op as hopper
from mambavision.ops.launch import dense, launcher
from mambavision.ops.map_layout import empty_map, laid_out
from mambavision.ops.tiles import HOPPER, LIBRARY, Tile, choose, common_unit, is_large, small_tiles, that_fit

FINISH_PIXELS, FINISH_COLUMNS = 32, 128
WIDE_FROM, FULL_FROM = 192, 0.77  # channels from which cuDNN's is faster, unless so much of our tiles is of use


def fitting(columns: int) -> tuple[int, int]:
    """Columns of the tile for so many columns, and of a second one beside it for a rest that is narrow."""
    if columns <= 64:
        return 64, 0
    if columns < 128 and columns % 64 in (16, 32):
        return 64, columns % 64
    if 128 < columns < 256 and columns % 128 in (16, 32, 64):
        return 128, columns % 128
    return (128, 0) if 0 < columns % 256 <= 128 else (256, 0)


def candidates(pixels: int, columns: int, channels: int, stride: int) -> list[Tile]:
    """The tiles worth trying, the likely best first."""
    if not is_large(pixels, columns):
        return [*small_tiles(pixels, columns), LIBRARY]
    width, tail = fitting(columns)
    if width == 64:
        ours = [Tile(128, 64, 64, 4, 4, tail), Tile(128, 64, 128, 4, 3, tail)]
    elif width == 128:
        ours = [Tile(128, 128, 64, 4, 3, tail), Tile(128, 128, 64, 8, 3, tail)]
    else:
        ours = [Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 4, 3)]
    tiles = width + tail
    wasteful = columns < FULL_FROM * tiles * -(-columns // tiles)
    return [LIBRARY, *ours] if channels >= WIDE_FROM and (stride > 1 or tail or wasteful) else [*ours, LIBRARY]


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
    pixels = batch * ((height - 1) // stride + 1) * ((width - 1) // stride + 1)
    if pixels == 0:
        return empty_map(x, weight, stride)
    x, weight, residual = laid_out(x, weight, residual)

    def run(tile: Tile) -> Tensor:
        if tile == HOPPER:
            y: Tensor = hopper.conv3x3(x, weight, bias, residual, stride, activation)
            return y
        if tile == LIBRARY:  # and a kernel for what follows it
            dense = weight.contiguous(memory_format=torch.channels_last)
            with torch.autocast(x.device.type, enabled=False):  # the result has the type of x
                out = F.conv2d(x, dense, None, stride, 1)
            return _finished(out, bias, residual, activation)
        out = empty_map(x, weight, stride)
        _launch_kernel(tile, x, weight, None, bias, residual, out, None, stride, activation)
        return out

    tiles = that_fit(candidates(pixels, columns, channels, stride), x.element_size(), x.device)
    served = is_large(pixels, columns) and hopper.serves(x, weight, None, bias, residual, activation)
    if served:
        tiles.insert(0, HOPPER)
    key = ("conv3x3", pixels, columns, channels, stride, x.dtype, activation, residual is None, served, x.device)
    return run(tile or choose(key, tiles, run))


def float8_candidates(pixels: int, columns: int) -> list[Tile]:
    """The tiles worth trying for 8-bit numbers, the likely best first."""
    if not is_large(pixels, columns):
        return small_tiles(pixels, columns)
    width, tail = fitting(columns)
    return [Tile(128, width, 128, 8, 3, tail), Tile(128, width, 128, 8, 4, tail), Tile(128, 128, 128, 8, 3)]


@triton_op("mambavision::conv3x3_float8", mutates_args=())
def conv3x3_float8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Like `conv3x3`, of 8-bit numbers and to such."""
    _, rounded = _float8(x, weight, scale, bias, None, activation)
    return rounded


@triton_op("mambavision::conv3x3_float8_add", mutates_args=())
def conv3x3_float8_add(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """The sum in the type of the residual, and in 8 bits."""
    total, rounded = _float8(x, weight, scale, bias, residual, activation)
    assert total is not None
    return total, rounded


def _float8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, activation: str
) -> tuple[Tensor | None, Tensor]:
    """With a tile chosen for the shape; the sum in the residual's type, where there is one, and in 8 bits."""
    batch, channels, height, width = x.shape
    columns, pixels = len(weight), batch * height * width

    def run(tile: Tile) -> tuple[Tensor | None, Tensor]:
        if tile == HOPPER and residual is None:
            return None, hopper.conv3x3_float8(x, weight, scale, bias, activation)
        if tile == HOPPER:
            both: tuple[Tensor, Tensor] = hopper.conv3x3_float8_add(x, weight, scale, bias, residual, activation)
            return both
        rounded = empty_map(x, weight)
        total = None if residual is None else empty_map(x, weight, dtype=residual.dtype)
        out, copy = (rounded, None) if total is None else (total, rounded)
        launch_float8(x, weight, scale, bias, residual, out, copy, activation, tile)
        return total, rounded

    tiles = that_fit(float8_candidates(pixels, columns), 1, x.device)
    served = is_large(pixels, columns) and hopper.serves(x, weight, scale, bias, residual, activation)
    if served:
        tiles.insert(0, HOPPER)
    wide = None if residual is None else residual.dtype
    key = ("conv3x3_float8", pixels, columns, channels, wide, activation, served, x.device)
    return run(choose(key, tiles, run))


def launch_float8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    out: Tensor,
    copy: Tensor | None,
    activation: str,
    tile: Tile,
) -> None:
    """Fill `out`, and `copy` where it is given, by the Triton kernel."""
    if out.numel():
        x, weight, residual = laid_out(x, weight, residual)
        _launch_kernel(tile, x, weight, scale, bias, residual, out, copy, 1, activation)


def _launch_kernel(
    tile: Tile,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    copy: Tensor | None,
    stride: int,
    activation: str,
) -> None:
    batch, channels, height, width = x.shape
    _, columns, out_height, out_width = out.shape
    strides = (x.stride(0), x.stride(2), x.stride(3), columns)
    unit = common_unit(*strides)
    tiles = triton.cdiv(columns, tile.columns + tile.tail) * triton.cdiv(batch * out_height * out_width, tile.rows)
    launcher(conv3x3_kernel)[(tiles,)](
        x, weight, dense(scale), dense(bias), residual, out, copy,
        batch, height, width, out_height, out_width, *(step // unit for step in strides),
        UNIT=unit, CHANNELS=channels, WEIGHT_ROW=weight.stride(0), WEIGHT_TAP=weight.stride(3), STRIDE=stride,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, TAIL=tile.tail, BLOCK_K=tile.inner,
        HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        HAS_COPY=copy is not None, ACTIVATION=activation, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _finished(out: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    """`out`, channels-last, behind bias, activation and residual, in place."""
    if bias is None and residual is None and activation == "none":
        return out
    out = out.contiguous(memory_format=torch.channels_last)
    columns = out.shape[1]
    pixels = out.numel() // columns
    unit = common_unit(columns)
    launcher(finish_kernel)[(triton.cdiv(columns, FINISH_COLUMNS) * triton.cdiv(pixels, FINISH_PIXELS),)](
        out, dense(bias), out if residual is None else residual, pixels, columns // unit,
        UNIT=unit, BLOCK_M=FINISH_PIXELS, BLOCK_N=FINISH_COLUMNS, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, ACTIVATION=activation, num_warps=4,
    )  # fmt: skip
    return out
