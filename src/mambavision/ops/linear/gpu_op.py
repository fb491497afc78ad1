"""The linear layer of 8-bit numbers on a GPU as an operator that PyTorch knows. Imported only where it runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from mambavision.ops.activation import activate
from mambavision.ops.float8 import to_float8
from mambavision.ops.hopper import product_op as hopper
from mambavision.ops.precision import FLOAT8
from mambavision.ops.tiles import HOPPER, LIBRARY, Tile, choose, is_large


@custom_op("mambavision::linear_float8", mutates_args=())
def linear_float8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    one: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """act(x weight^T scale + bias) in `dtype`, contiguous; arguments as in `mambavision.ops.linear.float8`."""
    rows, columns = x.shape[0], weight.shape[0]
    if rows == 0:
        return x.new_empty((0, columns), dtype=dtype)

    def run(tile: Tile) -> Tensor:
        if tile == HOPPER:
            y: Tensor = hopper.linear_float8(x, weight, scale, bias, activation)
            return y
        return _by_library(x, weight, scale, one, bias, activation, dtype)

    if dtype != FLOAT8 or bias is None:  # a result of 16 bits is the library's, its kernel the faster
        return run(LIBRARY)
    tiles = [LIBRARY]
    served = is_large(rows, columns) and hopper.serves(x, weight, scale, bias, None, activation)
    if served:
        tiles.insert(0, HOPPER)
    key = ("linear_float8", rows, columns, x.shape[1], activation, served, x.device)
    return run(choose(key, tiles, run))


@linear_float8.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    _scale: Tensor,
    _one: Tensor,
    _bias: Tensor | None,
    _activation: str,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


def _by_library(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    one: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    wide = torch.bfloat16 if dtype == FLOAT8 else dtype
    # PyTorch's public function is newer than the oldest PyTorch that runs this.
    y = torch._scaled_mm(
        x.contiguous(),
        weight.contiguous().t(),
        scale_a=one,
        scale_b=scale[:1],
        bias=None if bias is None else bias.to(wide),
        out_dtype=wide,
        use_fast_accum=True,
    )
    y = activate(y, activation)  # type: ignore[arg-type]
    return to_float8(y) if dtype == FLOAT8 else y
