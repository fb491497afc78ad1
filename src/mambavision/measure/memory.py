"""Running out of memory as a sentence that says what did not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OutOfMemoryError(ValueError):
    """Something that does not fit; the message says what, and what to do."""


@contextmanager
def fitting(what: str, device: torch.device, remedy: str) -> Iterator[None]:
    """Where PyTorch runs out of memory inside, raise `OutOfMemoryError`: `what` does not fit on `device`; `remedy`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemoryError(f"{what} does not fit on {device}; {remedy}.") from error
