"""The layer norm of a sum by PyTorch's own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm_reference(x: Tensor, offset: Tensor | None, eps: float) -> Tensor:
    """Arguments and result as in `mambavision.ops.layer_norm`."""
    total = x if offset is None else x + offset
    return F.layer_norm(total, total.shape[-1:], eps=eps).to(x.dtype)
