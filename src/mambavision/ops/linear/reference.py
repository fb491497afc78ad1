"""The fused linear layer as its parts read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambavision.ops.activation import Activation, activate

PART = 16  # columns that the moments tell of one by one


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_eps: float | None,
    weight_sum: Tensor | None,  # noqa: ARG001  (the signature of the kernel, which needs it)
    activation: Activation,
    moments: Tensor | None,  # noqa: ARG001  (likewise)
) -> Tensor:
    """Norm, product, activation, sum; arguments and result as in `mambavision.ops.linear`."""
    if norm_eps is not None:
        x = F.layer_norm(x, x.shape[-1:], eps=norm_eps)
    y = activate(F.linear(x, weight, None if bias is None else bias.to(x.dtype)), activation)
    return y if residual is None else (y + residual).to(x.dtype)


def linear_with_moments_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `mambavision.ops.linear.linear_with_moments`."""
    y = linear_reference(x, weight, bias, residual, None, None, "none", None)
    wide = y.reshape(-1, y.shape[-1]).to(torch.promote_types(y.dtype, torch.float32))
    parts = torch.split(wide, PART, dim=1)
    means = [part.mean(1) for part in parts]
    spreads = [(part - mean[:, None]).square().sum(1) for part, mean in zip(parts, means, strict=True)]
    return y, torch.stack([torch.stack(means, 1), torch.stack(spreads, 1)], 1)
