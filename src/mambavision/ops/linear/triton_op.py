"""The fused linear layer's kernel as an operator that PyTorch knows. Imported only where the backend runs."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.library import triton_op

from mambavision.ops.hopper import product_op as hopper
from mambavision.ops.launch import dense, launcher
from mambavision.ops.linear.kernels import linear_kernel
from mambavision.ops.linear.reference import PART
from mambavision.ops.tiles import HOPPER, LIBRARY, Tile, choose, common_unit, is_large, small_tiles, that_fit

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
    moments: Tensor | None = None,
) -> Tensor:
    """act(norm(x) weight^T + bias) + residual, contiguous; normed where `weight_sum` is given."""
    columns, inner = weight.shape
    shape = (*x.shape[:-1], columns)
    rows = prod(shape[:-1])
    if rows == 0 or columns == 0:
        return x.new_empty(shape)

    def run(tile: Tile) -> Tensor:
        if tile == HOPPER:
            y: Tensor = hopper.linear(x, weight, bias, activation)
            return y
        if tile == LIBRARY:
            with torch.autocast(x.device.type, enabled=False):  # the result has the type of x
                if activation == "none":
                    return F.linear(x, weight, bias)
                assert bias is not None  # no public function asks the library for what follows
                return torch._addmm_activation(bias, _rows(x), weight.t(), use_gelu=True).view(shape)
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
        launch(x, weight, bias, residual, weight_sum, norm_eps, activation, out, tile, moments=moments)
        return out

    tiles = that_fit(candidates(rows, columns), x.element_size(), x.device)
    # What libraries have at the end of a product, the latter only behind a bias.
    plain = weight_sum is None and residual is None and activation in ("none", "gelu_tanh")
    by_library = plain and _on_gpu(x) and (activation == "none" if bias is None else bias.dtype == x.dtype)
    if by_library:
        tiles.insert(0, LIBRARY)
    served = plain and is_large(rows, columns) and hopper.serves(x, weight, None, bias, None, activation)
    if served:
        tiles.insert(0, HOPPER)
    without = tuple(each is None for each in (weight_sum, bias, residual, moments))
    key = ("linear", rows, columns, inner, x.dtype, activation, without, by_library, served, x.device)
    return run(choose(key, tiles, run))


@triton_op("mambavision::linear_with_moments", mutates_args=())
def linear_with_moments(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """X weight^T + bias + residual, contiguous, and its moments."""
    columns, inner = weight.shape
    shape = (*x.shape[:-1], columns)
    rows = prod(shape[:-1])
    moments = torch.empty((rows, 2, -(-columns // PART)), dtype=torch.float32, device=x.device)
    if rows == 0 or columns == 0:
        return x.new_empty(shape), moments

    def run(tile: Tile) -> Tensor:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
        launch(x, weight, bias, residual, None, 0.0, "none", out, tile, out_moments=moments)
        return out

    tiles = that_fit(candidates(rows, columns), x.element_size(), x.device)
    without = tuple(each is None for each in (bias, residual))
    return run(choose(("linear_with_moments", rows, columns, inner, x.dtype, without, x.device), tiles, run)), moments


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight_sum: Tensor | None,
    norm_eps: float,
    activation: str,
    out: Tensor,
    tile: Tile,
    *,
    moments: Tensor | None = None,
    out_moments: Tensor | None = None,
) -> None:
    """Fill `out`, and `out_moments` where they are asked for, by the Triton kernel."""
    columns, inner = weight.shape
    x2, out2 = _rows(x), out.view(-1, columns)
    rows = x2.shape[0]
    residual2 = out2 if residual is None else _rows(residual)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    bias, weight_sum, moments = dense(bias), dense(weight_sum), dense(moments)
    lengths = inner, weight.stride(0), x2.stride(0), residual2.stride(0), columns
    unit = common_unit(*lengths)
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)
    launcher(linear_kernel)[grid](
        x2, weight, bias, weight_sum, residual2, moments, out2, out_moments,
        rows, columns, *(length // unit for length in lengths), norm_eps,
        UNIT=unit, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.inner, GROUP=GROUP,
        EVEN_K=inner % tile.inner == 0, NORM=weight_sum is not None,
        PARTS=0 if moments is None else triton.next_power_of_2(moments.shape[2]),
        GIVES_MOMENTS=out_moments is not None, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, ACTIVATION=activation, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _rows(tensor: Tensor) -> Tensor:
    """(..., n) as (rows, n) with neighbours side by side; a view where the strides allow it."""
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).reshape(-1, tensor.shape[-1])
