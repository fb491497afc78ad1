"""The fused linear layer as its parts read."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mambavision.ops.activation import Activation, activate


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_eps: float | None,
    weight_sum: Tensor | None,  # noqa: ARG001  (the signature of the kernel, which needs it)
    activation: Activation,
) -> Tensor:
    """Norm, product, activation, sum; arguments and result as in `mambavision.ops.linear`."""
    if norm_eps is not None:
        x = F.layer_norm(x, x.shape[-1:], eps=norm_eps)
    y = activate(F.linear(x, weight, None if bias is None else bias.to(x.dtype)), activation)
    return y if residual is None else (y + residual).to(x.dtype)
