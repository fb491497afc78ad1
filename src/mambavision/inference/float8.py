"""Products in 8 bits, which take a GPU half the time of those in 16: convolutions, and the blocks' linear layers.

The stream that the blocks add to stays in 16 bits. What the convolutions read of it, what lies between the two of a
block, what norms give to linear layers, what lies in the middle of an MLP, and the weights are rounded to
float8_e4m3fn, with 3 bits of mantissa: sums of many products are off by some percent of a block's share. Weights of
convolutions have a scale per output channel, those of linear layers one for all, as the libraries' products have it.
Maps and tokens have none: they are what norms gave out, sums of that, or what GELU makes of a product of it, far below
the type's 448, at which they are cut, and what is smaller than its 0.002 weighs nothing beside the rest. The layer
behind a mixer, a tenth of a block's products, stays as it is: rounding what it reads would take as long as it gains.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.inference.aligned import AlignedLinear
from mambavision.inference.exact import CastWithExact
from mambavision.layers.conv_block import ConvBlock
from mambavision.ops.activation import Activation
from mambavision.ops.conv3x3 import aligned_rows, weight_of_rows
from mambavision.ops.conv3x3.float8 import conv3x3_float8
from mambavision.ops.float8 import scaled_to_float8, to_float8
from mambavision.ops.linear.float8 import UNIT, linear_float8
from mambavision.ops.precision import FLOAT8


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
        return weight_of_rows(self.rows.view(FLOAT8), self.channels)


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


class Float8Linear(CastWithExact):
    """A linear layer of 8-bit numbers.

    Args:
        layer: what is rounded.
        bias: whether its bias is added.
        to_float8: whether the results have 8 bits, too.
    """

    scale: Tensor
    one: Tensor

    def __init__(self, layer: nn.Linear | AlignedLinear, *, bias: bool, to_float8: bool) -> None:
        super().__init__()
        self.to_float8 = to_float8
        self.exact = ("scale", "one", "bias") if to_float8 else ("scale", "one")
        weight, scale = scaled_to_float8(layer.weight.detach(), together=True)
        self.register_buffer("rounded", weight.view(torch.uint8))  # as bytes, like those of the convolutions
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("one", torch.ones(1, device=scale.device))
        self.register_buffer("bias", layer.bias.detach().float() if bias else None)

    def forward(self, x: Tensor, dtype: torch.dtype, activation: Activation = "none") -> Tensor:
        """(rows, inner) in 8 bits to (rows, columns), in 8 bits or in `dtype`."""
        dtype = FLOAT8 if self.to_float8 else dtype
        weight, bias = cast("Tensor", self.rounded).view(FLOAT8), cast("Tensor | None", self.bias)
        return linear_float8(x, weight, self.scale, self.one, bias, activation=activation, dtype=dtype)


class Float8Products(nn.Module):
    """What a token block multiplies behind its norms, in 8 bits; the bias of its last layer is added elsewhere."""

    def __init__(self, first: AlignedLinear, fc1: AlignedLinear, fc2: nn.Linear) -> None:
        super().__init__()
        self.first = Float8Linear(first, bias=first.bias is not None, to_float8=False)
        self.fc1 = Float8Linear(fc1, bias=True, to_float8=True)
        self.fc2 = Float8Linear(fc2, bias=False, to_float8=False)

    @staticmethod
    def fit(*layers: nn.Linear | AlignedLinear) -> bool:
        """Whether the layers are of sizes that 8-bit products take."""
        return all(size % UNIT == 0 for layer in layers for size in layer.weight.shape)
