"""The convolution over tokens as a product a tap.

Libraries transpose for this convolution and have no fast backward for it; a compiler makes one pass of the products and
what follows.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_conv_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Arguments and result as in `mambavision.ops.token_conv`."""
    taps = weight.to(x.dtype).unbind(1)
    length, reach = x.shape[1], len(taps) // 2
    padded = F.pad(x, (0, 0, reach, reach))
    y = padded[:, :length] * taps[0]
    for place, tap in enumerate(taps[1:], start=1):
        y = y + padded[:, place : place + length] * tap
    return F.silu(y)
