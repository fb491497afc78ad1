"""The stem's kernels as an operator that PyTorch knows. Imported only where the backend runs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from mambavision.ops.conv3x3.triton_op import launch
from mambavision.ops.launch import launcher
from mambavision.ops.map_layout import new_map
from mambavision.ops.stem.kernels import first_conv_kernel, stem_kernel
from mambavision.ops.tiles import Tile, choose, common_unit

TWO_STEPS_FROM = 16384  # pixels of the result; from there the map between the convolutions is better stored
FIRST_PIXELS = 128  # a program, of the first convolution alone


@triton_op("mambavision::stem", mutates_args=())
def stem(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, stride1: int, stride2: int
) -> Tensor:
    """ReLU(conv(ReLU(conv(x)))) in the weights' type, channels-last."""
    batch, colours, height, width = x.shape
    columns, middle = weight2.shape[:2]
    mid_height, mid_width = (height - 1) // stride1 + 1, (width - 1) // stride1 + 1
    out_height, out_width = (mid_height - 1) // stride2 + 1, (mid_width - 1) // stride2 + 1
    pixels = batch * out_height * out_width
    if pixels == 0:
        return weight1.new_empty((batch, columns, out_height, out_width))
    weight1 = weight1.contiguous(memory_format=torch.channels_last)
    bias1, bias2 = bias1.contiguous(), bias2.contiguous()
    patch = triton.next_power_of_2(9 * colours)
    if pixels >= TWO_STEPS_FROM:
        between = new_map(batch, middle, mid_height, mid_width, like=x, dtype=weight1.dtype)
        launcher(first_conv_kernel)[(triton.cdiv(batch * mid_height * mid_width, FIRST_PIXELS),)](
            x, weight1, bias1, between, batch, height, width, mid_height, mid_width, *x.stride(),
            IN=colours, PATCH=patch, MIDDLE=middle, STRIDE=stride1, BLOCK_M=FIRST_PIXELS, num_warps=4,
        )  # fmt: skip
        return launch(between, weight2, bias2, None, stride2, "relu")
    weight2 = weight2.contiguous(memory_format=torch.channels_last)
    out = new_map(batch, columns, out_height, out_width, like=x, dtype=weight1.dtype)
    unit = common_unit(columns)

    def run(tile: Tile) -> None:
        grid = (triton.cdiv(columns, tile.columns), triton.cdiv(pixels, tile.rows))
        launcher(stem_kernel)[grid](
            x, weight1, bias1, weight2, bias2, out,
            batch, height, width, mid_height, mid_width, out_height, out_width, columns, *x.stride(), columns // unit,
            UNIT=unit, IN=colours, PATCH=patch, MIDDLE=middle, STRIDE1=stride1, STRIDE2=stride2,
            BLOCK_M=tile.rows, BLOCK_N=tile.columns, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    key = ("stem", pixels, columns, weight1.shape, x.dtype, weight1.dtype, x.stride(), x.device)
    run(choose(key, candidates(columns), run))
    return out


def candidates(columns: int) -> list[Tile]:
    """The tiles worth trying, the likely best first; the inner size is the kernel's own."""
    wide = min(128, triton.next_power_of_2(columns))
    return [Tile(32, wide, 0, 4, 2), Tile(32, 32, 0, 4, 2), Tile(64, wide, 0, 4, 2)]
