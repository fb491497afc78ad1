"""Whether a module may be computed by its function, together with its neighbours."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _hooks

from mambavision.ops.tracing import is_exporting

_KINDS = (nn.Linear, nn.GELU, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm)


def are_plain(*modules: nn.Module) -> bool:
    """Whether calling the modules does no more than their arithmetic: no adapter, no wrapped forward, no hooks."""
    return all(type(module) in _KINDS and not has_hooks(module) for module in modules)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward: hooks of its own or of all, a wrapped or compiled call."""
    anywhere = _hooks._global_forward_hooks or _hooks._global_forward_pre_hooks
    anywhere = anywhere or _hooks._global_backward_hooks or _hooks._global_backward_pre_hooks
    return bool(anywhere) or has_own_hooks(module) or module._compiled_call_impl is not None


def has_own_hooks(module: nn.Module) -> bool:
    """The same of what belongs to the module and changes what it computes: its hooks, and a wrapped forward."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or has_wrapped_forward(module)


def has_wrapped_forward(module: nn.Module) -> bool:
    """Whether the instance has another forward than its class; some unwrappers leave it that of its class."""
    forward = module.__dict__.get("forward")
    bound = getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module
    return forward is not None and not bound


def is_fused(x: Tensor) -> bool:
    """Whether layers take the ops that fuse their parts for training: on a GPU, where a compiler launches them.

    Without one the host is what training waits for, and an operator that is written in Python takes it longer.
    """
    return x.is_cuda and torch.compiler.is_compiling() and not is_exporting()
