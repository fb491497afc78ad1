"""Parameters of folded layers as the GPU kernels read them fastest: channels padded, rows in whole lines of the cache.

A row has zeros at its end that no kernel reads; cast and moved with the network, it keeps its length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.ops.conv3x3 import aligned_rows, weight_of_rows
from mambavision.ops.map_layout import padded_to_lines

BYTES = 2  # of an element, in the types that the kernels are fast in


class AlignedConv(nn.Module):
    """The parameters of a folded 3x3 convolution, with more channels in and out."""

    def __init__(self, conv: nn.Conv2d, inputs: int, outputs: int) -> None:
        super().__init__()
        self.channels = inputs
        wider = padded(conv, inputs, outputs)
        self.rows = nn.Parameter(aligned_rows(wider.weight.detach(), bytes_each=BYTES), requires_grad=False)
        self.bias = wider.bias

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs, 3, 3)."""
        return weight_of_rows(self.rows, self.channels)


class AlignedLinear(nn.Module):
    """The parameters of a linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.channels = layer.in_features
        self.rows = nn.Parameter(padded_to_lines(layer.weight.detach(), bytes_each=BYTES), requires_grad=False)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        """(columns, channels)."""
        return self.rows[:, : self.channels]


def padded(conv: nn.Conv2d, inputs: int, outputs: int) -> nn.Conv2d:
    """`conv` with zero weights for more channels, channels-last."""
    wider = nn.Conv2d(inputs, outputs, 3, conv.stride, 1, bias=conv.bias is not None, device="meta")  # type: ignore[arg-type]  # torch's stride is a tuple of any length
    more = (0, 0, 0, 0, 0, inputs - conv.in_channels, 0, outputs - conv.out_channels)
    weight = F.pad(conv.weight.detach(), more).contiguous(memory_format=torch.channels_last)
    wider.weight = nn.Parameter(weight, requires_grad=False)
    if conv.bias is not None:
        bias = F.pad(conv.bias.detach(), (0, outputs - conv.out_channels))
        wider.bias = nn.Parameter(bias, requires_grad=False)
    return wider
