"""Whether a module may be computed by its function, together with its neighbours."""

from __future__ import annotations

from torch import nn

_KINDS = (nn.Linear, nn.GELU, nn.Conv2d, nn.BatchNorm2d)


def are_plain(*modules: nn.Module) -> bool:
    """Whether calling the modules does no more than their arithmetic: no adapter in their place, and no hooks."""
    return all(
        type(module) in _KINDS
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        for module in modules
    )
