"""The convolution over tokens by PyTorch's own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_conv_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Arguments and result as in `mambavision.ops.token_conv`."""
    channels, kernel = weight.shape
    y = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), padding=kernel // 2, groups=channels)
    return F.silu(y).transpose(1, 2)
