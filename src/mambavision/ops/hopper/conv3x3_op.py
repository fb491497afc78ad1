"""A 3x3 convolution in training by the product for Hopper GPUs: the map and its gradient; the weight's is cuDNN's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from mambavision.ops import launch
from mambavision.ops.hopper import product_op
from mambavision.ops.hopper.availability import fault
from mambavision.ops.map_layout import empty_map
from mambavision.ops.precision import HALVES
from mambavision.ops.tiles import is_large

LIBRARYS_UNIT = 128  # channels, of multiples of which cuDNN is as fast; of others it computes more than is asked for


def serves(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the convolution, in `dtype`, should be computed here in both directions."""
    columns, channels = weight.shape[:2]
    pixels = x.numel() // channels
    return (
        x.is_cuda
        and dtype in HALVES
        and fault(launch.index_of(x.device)) is None  # before what a compiler would guard elsewhere too
        and columns % LIBRARYS_UNIT != 0
        and channels % LIBRARYS_UNIT != 0
        and is_large(pixels, columns)
        and product_op.fits(channels, columns, pixels)
        and product_op.fits(columns, channels, pixels)
    )


@custom_op("mambavision::conv3x3_hopper_for_training", mutates_args=())
def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution of x by weight, (columns, channels, 3, 3), both of 16 bits, with padding 1; channels-last."""
    return product_op.conv3x3(x, weight, None, None, 1, "none")  # type: ignore[no-any-return]


conv3x3.register_fake(empty_map)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:  # noqa: ARG001  (PyTorch's signature)
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    turned = weight.flip((2, 3)).transpose(0, 1).contiguous(memory_format=torch.channels_last)
    grad_x = product_op.conv3x3(grad_y, turned, None, None, 1, "none")
    wanted, one = [False, True, False], [1, 1]
    _, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_y, x, weight, None, one, one, one, False, [0, 0], 1, wanted
    )
    return grad_x, grad_weight


conv3x3.register_autograd(_differentiate, setup_context=_setup_context)
