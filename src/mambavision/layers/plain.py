"""Whether a module may be computed by its function, together with its neighbours."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as _hooks

_KINDS = (nn.Linear, nn.GELU, nn.Conv2d, nn.BatchNorm2d)


def are_plain(*modules: nn.Module) -> bool:
    """Whether calling the modules does no more than their arithmetic: no adapter, no wrapped forward, no hooks."""
    anywhere = _hooks._global_forward_hooks or _hooks._global_forward_pre_hooks
    anywhere = anywhere or _hooks._global_backward_hooks or _hooks._global_backward_pre_hooks
    return not anywhere and all(
        type(module) in _KINDS
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        for module in modules
    )
