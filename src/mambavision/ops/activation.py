"""The activations that end a fused op, in PyTorch for the references."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Activation = Literal["none", "relu", "gelu", "gelu_tanh"]


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply one by name; `gelu` is the exact form, by erf.

    Raises:
        ValueError: no such activation.
    """
    if activation == "none":
        return x
    if activation == "relu":
        return F.relu(x)
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    raise ValueError(f"activation must be none, relu, gelu or gelu_tanh, got {activation!r}.")
