"""Modules of which a part keeps its type when the rest is cast to half precision."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mambavision.ops.precision import HALVES


class CastWithExact(nn.Module):
    """A module whose buffers named in `exact` stay in their type when the rest is cast to half precision."""

    exact: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CastWithExact:
        kept = {name: getattr(self, name) for name in self.exact if getattr(self, name) is not None}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = getattr(self, name)
            if moved.dtype in HALVES:
                setattr(self, name, tensor.to(moved.device))
        return self
