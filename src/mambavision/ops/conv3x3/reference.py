"""The fused convolution as its parts read."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mambavision.ops.activation import Activation, activate


def conv3x3_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: int, activation: Activation
) -> Tensor:
    """Convolution, activation, sum; arguments and result as in `mambavision.ops.conv3x3`."""
    y = activate(F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, 1), activation)
    return y if residual is None else (y + residual).to(x.dtype)
