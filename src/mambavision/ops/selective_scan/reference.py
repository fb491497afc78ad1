"""The selective scan as its definition reads, one token after the other: the truth the other backends are held to.

Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), section 3.2,
with the discretisation of algorithm 2; used by the MambaVision mixer (CVPR 2025, equation 6).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambavision.ops.precision import at_least_float32


def selective_scan_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, dt_bias: Tensor | None = None
) -> Tensor:
    """Sequential scan on plain autograd; arguments and result as in `mambavision.ops.selective_scan`."""
    dtype = at_least_float32(x.dtype)
    u, step, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    step = F.softplus(step)  # (batch, length, channels)
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])  # (batch, channels, state)
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(step[:, t, :, None] * A)  # (batch, channels, state)
        h = decay * h + (step[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        outputs.append((h * C[:, t, None, :]).sum(-1))  # (batch, channels)
    y = torch.stack(outputs, dim=1)  # (batch, length, channels)
    if D is not None:
        y = y + D.to(dtype) * u
    return y.to(x.dtype)
