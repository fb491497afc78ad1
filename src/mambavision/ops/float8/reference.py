"""Rounding to 8 bits by PyTorch's own conversion, which makes NaN of what is too large unless it is cut before."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST: float = torch.finfo(torch.float8_e4m3fn).max  # 448


def to_float8_reference(x: Tensor) -> Tensor:
    """Arguments and result as in `mambavision.ops.float8.to_float8`."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
