"""The convolutions of levels 0 and 1 in 8 bits, whose products take a GPU half the time of those of 16.

The stream that the blocks add to stays in 16 bits. What the convolutions read of it, what lies between the two of a
block, and the weights are rounded to float8_e4m3fn, with 3 bits of mantissa: sums of many products are off by some
percent of a block's share. Weights have a scale per output channel. Maps have none: they are sums of what batch norms
gave out, far below the type's 448, and what is smaller than its 0.002 weighs nothing beside the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.inference.exact import CastWithExact
from mambavision.layers.conv_block import ConvBlock
from mambavision.ops.conv3x3 import aligned_rows, weight_of_rows
from mambavision.ops.conv3x3.float8 import conv3x3_float8
from mambavision.ops.float8 import scaled_to_float8, to_float8


class Float8Conv(CastWithExact):
    """A folded 3x3 convolution with `width` channels in and out, those beyond its own zero."""

    exact = ("scale", "bias")
    rows: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, width: int) -> None:
        super().__init__()
        self.channels = width
        more = width - conv.out_channels
        weight, scale = scaled_to_float8(F.pad(conv.weight.detach(), (0, 0, 0, 0, 0, more, 0, more)))
        # As bytes: 8-bit numbers can neither be padded nor pickled, and casts would touch them.
        self.register_buffer("rows", aligned_rows(weight.view(torch.uint8), bytes_each=1))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", F.pad(cast("Tensor", conv.bias).detach().float(), (0, more)))

    @property
    def weight(self) -> Tensor:
        """(width, width, 3, 3)."""
        return weight_of_rows(self.rows.view(torch.float8_e4m3fn), self.channels)


class Float8ConvBlocks(nn.Module):
    """All `ConvBlock`s of a level, on maps of `width` channels."""

    def __init__(self, blocks: Iterable[ConvBlock], width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.ModuleList(Float8Conv(conv, width) for conv in (block.conv1, block.conv2)) for block in blocks
        )

    def forward(self, x: Tensor) -> Tensor:  # (batch, width, H, W), the same out
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "A network optimised in float8 has no gradients; run it under torch.no_grad(), or use the model itself."
            )
        rounded = to_float8(x)
        for first, second in cast("Iterable[tuple[Float8Conv, Float8Conv]]", self.convs):
            _, branch = conv3x3_float8(rounded, first.weight, first.scale, first.bias, activation="gelu_tanh")
            total, rounded = conv3x3_float8(branch, second.weight, second.scale, second.bias, residual=x)
            x = cast("Tensor", total)
        return x
