"""The MLP as its parts read."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def mlp_reference(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Arguments and result as in `mambavision.ops.mlp`."""
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)
