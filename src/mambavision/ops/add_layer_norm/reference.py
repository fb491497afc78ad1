"""The sum and its layer norm by PyTorch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambavision.ops.precision import at_least_float32


def scaled_branch(branch: Tensor, shift: Tensor | None, gamma: Tensor | None, scale: Tensor | None) -> Tensor:
    """(branch + shift) gamma scale, each left out where it is None; the shift in the type of the branch."""
    branch = branch if shift is None else branch + shift.to(branch.dtype)
    branch = branch if gamma is None else branch * gamma
    return branch if scale is None else branch * scale.to(branch.dtype).view(-1, *([1] * (branch.dim() - 1)))


def add_layer_norm_reference(
    x: Tensor,
    branch: Tensor | None,
    shift: Tensor | None,
    gamma: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `mambavision.ops.add_layer_norm`."""
    if branch is not None:
        x = x + scaled_branch(branch, shift, gamma, scale)
    y = x
    if not x.dtype == weight.dtype == bias.dtype:  # of one type PyTorch takes them as they are; it computes in float32
        wide = at_least_float32(x.dtype, weight.dtype, bias.dtype)
        y, weight, bias = x.to(wide), weight.to(wide), bias.to(wide)
    return x, F.layer_norm(y, y.shape[-1:], weight, bias, eps).to(dtype)
