"""The stem's kernel as an operator that PyTorch knows. Imported only where the backend runs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from mambavision.ops.stem.kernels import stem_kernel
from mambavision.ops.tiles import Tile, choose


def candidates(pixels: int, columns: int) -> list[Tile]:
    """The tiles worth trying, the likely best first; stages and the inner size are the kernel's own."""
    if pixels <= 4096:
        return [Tile(32, 32, 0, 4, 2), Tile(32, 64, 0, 4, 2), Tile(64, 128, 0, 4, 2)]
    wide = min(256, triton.next_power_of_2(columns))
    return [Tile(128, wide, 0, 8, 2), Tile(128, wide, 0, 4, 2), Tile(64, wide, 0, 4, 2)]


@triton_op("mambavision::stem", mutates_args=())
def stem(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, stride1: int, stride2: int
) -> Tensor:
    """ReLU(conv(ReLU(conv(x)))) in the weights' type, channels-last."""
    batch, _, height, width = x.shape
    columns = weight2.shape[0]
    mid_height, mid_width = (height - 1) // stride1 + 1, (width - 1) // stride1 + 1
    shape = (batch, columns, (mid_height - 1) // stride2 + 1, (mid_width - 1) // stride2 + 1)
    out = torch.empty(shape, dtype=weight1.dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel():
        launch(x, weight1, bias1, weight2, bias2, stride1, stride2, out)
    return out


def launch(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    stride1: int,
    stride2: int,
    out: Tensor,
    tile: Tile | None = None,
) -> None:
    """Fill `out`, with a tile chosen for the shape or given."""
    batch, colours, height, width = x.shape
    columns, (out_height, out_width) = weight2.shape[0], out.shape[2:]
    mid_height, mid_width = (height - 1) // stride1 + 1, (width - 1) // stride1 + 1
    weight1 = weight1.contiguous()
    weight2 = weight2.contiguous(memory_format=torch.channels_last)
    unit = next(unit for unit in (8, 4, 2, 1) if columns % unit == 0)
    pixels = batch * out_height * out_width

    def run(tile: Tile) -> None:
        grid = (triton.cdiv(columns, tile.columns), triton.cdiv(pixels, tile.rows))
        wrap_triton(stem_kernel)[grid](
            x, weight1, bias1, weight2, bias2, out,
            batch, height, width, mid_height, mid_width, out_height, out_width, columns, *x.stride(), columns // unit,
            UNIT=unit, IN=colours, PATCH=triton.next_power_of_2(9 * colours), MIDDLE=weight1.shape[0],
            STRIDE1=stride1, STRIDE2=stride2, BLOCK_M=tile.rows, BLOCK_N=tile.columns, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip

    key = ("stem", pixels, columns, weight1.shape, x.dtype, weight1.dtype, x.stride(), x.device)
    run(tile or choose(key, candidates(pixels, columns), run))
