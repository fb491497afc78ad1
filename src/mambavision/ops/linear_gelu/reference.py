"""The layer as its parts read."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Arguments and result as in `mambavision.ops.linear_gelu`."""
    return F.gelu(F.linear(x, weight, bias))
