"""The stem as its parts read."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def stem_reference(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, strides: tuple[int, int]
) -> Tensor:
    """Arguments and result as in `mambavision.ops.stem`."""
    x = F.relu(F.conv2d(x.to(weight1.dtype), weight1, bias1, strides[0], 1))
    return F.relu(F.conv2d(x, weight2, bias2, strides[1], 1))
