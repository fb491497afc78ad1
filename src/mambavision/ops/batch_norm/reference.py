"""Batch norm and what follows it by PyTorch's own operations."""

from __future__ import annotations

import torch
from torch import Tensor

from mambavision.ops.activation import Activation, activate
from mambavision.ops.precision import at_least_float32


def batch_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in `mambavision.ops.batch_norm`."""
    wide = x.to(at_least_float32(x.dtype))
    variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    y = (wide - mean[:, None, None]) * ((variance + eps).rsqrt() * weight)[:, None, None] + bias[:, None, None]
    y = activate(y, activation)
    if scale is not None:
        y = y * scale[:, None, None, None]
    y = y.to(x.dtype)
    return y if residual is None else y + residual, mean.detach(), variance.detach()
