"""The layer norm and the sums around it by PyTorch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm_reference(x: Tensor, offset: Tensor | None, eps: float, dtype: torch.dtype | None) -> Tensor:
    """Arguments and result as in `mambavision.ops.layer_norm`."""
    total = x if offset is None else x + offset
    return F.layer_norm(total, total.shape[-1:], eps=eps).to(dtype or x.dtype)


def layer_norm_and_sum_reference(
    x: Tensor, shift: Tensor, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `mambavision.ops.layer_norm.layer_norm_and_sum`."""
    return layer_norm_reference(x, None, eps, dtype), (x + shift).to(x.dtype)


def layer_norm_of_sum_reference(
    x: Tensor, share: Tensor, offset: Tensor | None, eps: float, dtype: torch.dtype | None
) -> Tensor:
    """Arguments and result as in `mambavision.ops.layer_norm.layer_norm_of_sum_`."""
    return layer_norm_reference(x.add_(share), offset, eps, dtype)
