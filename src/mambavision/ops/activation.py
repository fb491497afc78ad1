"""The activations that end a fused op, in PyTorch for the references."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

Activation = Literal["none", "relu", "gelu", "gelu_tanh"]
_NAMES: tuple[str, ...] = get_args(Activation)


def check_activation(activation: str) -> None:
    """Raise ValueError for what is none of `Activation`."""
    if activation not in _NAMES:
        raise ValueError(f"activation must be one of {', '.join(_NAMES)}, got {activation!r}.")


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply one by name; `gelu` is the exact form, by erf."""
    if activation == "none":
        return x
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
