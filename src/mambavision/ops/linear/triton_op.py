"""The fused linear layer's kernel as an operator that PyTorch knows. Imported only where the backend runs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from mambavision.ops.launch import dense, launcher
from mambavision.ops.linear.kernels import linear_kernel
from mambavision.ops.tiles import Tile, choose, common_unit, is_large, small_tiles, that_fit

GROUP = 8


def candidates(rows: int, columns: int) -> list[Tile]:
    """The tiles worth trying, the likely best first."""
    if is_large(rows, columns):
        return [Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 4, 4), Tile(128, 256, 64, 8, 3)]
    return small_tiles(rows, columns)


@triton_op("mambavision::linear", mutates_args=())
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight_sum: Tensor | None,
    norm_eps: float,
    activation: str,
) -> Tensor:
    """act(norm(x) weight^T + bias) + residual, contiguous; normed where `weight_sum` is given."""
    out = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    if out.numel():
        launch(x, weight, bias, residual, weight_sum, norm_eps, activation, out)
    return out


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight_sum: Tensor | None,
    norm_eps: float,
    activation: str,
    out: Tensor,
    tile: Tile | None = None,
) -> None:
    """Fill `out`, with a tile chosen for the shape or given."""
    columns, inner = weight.shape
    x2, out2 = _rows(x), out.view(-1, columns)
    rows = x2.shape[0]
    residual2 = out2 if residual is None else _rows(residual)
    weight, bias, weight_sum = weight.contiguous(), dense(bias), dense(weight_sum)
    unit = common_unit(inner, x2.stride(0), residual2.stride(0), columns)

    def run(tile: Tile) -> None:
        grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)
        launcher(linear_kernel)[grid](
            x2, weight, bias, weight_sum, residual2, out2,
            rows, columns, inner // unit, x2.stride(0) // unit, residual2.stride(0) // unit, columns // unit, norm_eps,
            UNIT=unit, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.inner, GROUP=GROUP,
            EVEN_K=inner % tile.inner == 0, NORM=weight_sum is not None, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None, ACTIVATION=activation, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    key = ("linear", rows, columns, inner, x.dtype, activation, weight_sum is None, residual is None, x.device)
    run(tile or choose(key, that_fit(candidates(rows, columns), x.element_size(), x.device), run))


def _rows(tensor: Tensor) -> Tensor:
    """(..., n) as (rows, n) with neighbours side by side; a view where the strides allow it."""
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).reshape(-1, tensor.shape[-1])
