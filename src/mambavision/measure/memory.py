"""Running out of memory as a sentence that says what did not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# How PyTorch says it where it has no exception of its own for it: memory of the host, of MPS, sizes beyond 2^63.
_SIGNS = ("DefaultCPUAllocator", "out of memory", "Storage size calculation overflowed")


class OutOfMemoryError(ValueError):
    """Something that does not fit; the message says what, and what to do."""


@contextmanager
def fitting(what: str, device: torch.device, remedy: str) -> Iterator[None]:
    """Where PyTorch runs out of memory inside, raise `OutOfMemoryError`: `what` does not fit on `device`; `remedy`."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in _SIGNS):
            raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemoryError(f"{what} does not fit on {device}; {remedy}.") from error
