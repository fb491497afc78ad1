"""Where a non-finite loss or gradient comes from: the step is done once more with a look at every layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(RuntimeError):
    """Training met a loss or gradient that is not finite; the message names step, learning rate and layer."""


def first_bad_layer(model: nn.Module, losses: Callable[[], Tensor]) -> str:
    """Name the first thing in `model` that is not finite: a parameter, a layer's output, or a layer's gradient.

    Args:
        model: the network, uncompiled, in the state in which the step failed.
        losses: does the step's forward passes again and returns the loss.

    Returns:
        A clause to end a sentence with.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the parameter {name} is not finite"
    found: list[str] = []

    def look(clause: str, *values: Any) -> None:
        if not found and any(not value.isfinite().all() for value in _tensors(values)):
            found.append(clause)

    def look_at_output(clause: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        look(clause, output)

    # Hooks run when a module is done, so a part is seen before the whole that contains it.
    hooks = [
        module.register_forward_hook(
            partial(look_at_output, f"the first output that is not finite is that of {name} ({type(module).__name__})")
        )
        for name, module in model.named_modules(prefix="model")
    ]
    hooks += [
        parameter.register_hook(
            partial(look, f"the loss is finite; going back from it, the first gradient that is not is that of {name}")
        )
        for name, parameter in model.named_parameters()
    ]
    try:
        loss = losses()
        if not found and not loss.isfinite():
            return "every layer's output is finite, and only the loss is not"
        if not found:
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return found[0] if found else "it did not happen again when the step was repeated"


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, torch.Tensor):
        return [values] if values.is_floating_point() else []
    return [tensor for value in values for tensor in _tensors(value)] if isinstance(values, (tuple, list)) else []
