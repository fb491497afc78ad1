"""Modules of which a part keeps its type when the rest is cast."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class CastWithExact(nn.Module):
    """A module whose buffers named in `exact` stay in their type when the rest is cast."""

    exact: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CastWithExact:
        kept = {name: getattr(self, name) for name in self.exact if getattr(self, name) is not None}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            setattr(self, name, tensor.to(getattr(self, name).device))
        return self
