"""Training and evaluation mode, and what lies between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while it lasts; then every module is in its own mode again, frozen parts too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def recomputing(module: nn.Module) -> Iterator[None]:
    """While it lasts, batch norms leave their running statistics as they are: they have counted this batch before."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    settings = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (momentum, counter) in zip(norms, settings, strict=True):
        # A counter to throw away, not none: whether there is one decides how the norm is computed.
        counter = None if momentum is None or counter is None else counter.clone()
        norm.momentum, norm.num_batches_tracked = 0.0, counter
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, settings, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter
