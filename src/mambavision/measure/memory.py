"""Running out of memory as a sentence that says what did not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# How PyTorch says it where it has no exception of its own for it: memory of the host, of MPS, sizes beyond 2^63.
_SIGNS = ("DefaultCPUAllocator", "out of memory", "Storage size calculation overflowed")


class OutOfMemoryError(ValueError):
    """Something that does not fit; the message says what, and what to do."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch says by `error` that something does not fit."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def fitting(what: str, device: torch.device, remedy: str) -> Iterator[None]:
    """Where PyTorch runs out of memory inside, raise `OutOfMemoryError`: `what` does not fit on `device`; `remedy`."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemoryError(f"{what} does not fit on {device}; {remedy}.") from error
