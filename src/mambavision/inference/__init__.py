"""Trained networks in use: pictures in and labels out, and networks made fast."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambavision.inference.optimization import optimize

__all__ = ["optimize"]


def __getattr__(name: str) -> Any:  # on first use, so that reading pictures alone loads no network
    if name != "optimize":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mambavision.inference.optimization import optimize

    return optimize
