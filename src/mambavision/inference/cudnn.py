"""Having cuDNN time its algorithms for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_users = 0
_before = False


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """While it lasts, cuDNN times its algorithms for each convolution that first comes, and takes the best.

    The setting is the process's. Threads may overlap: the first to come notes it, and the last to leave restores it.
    """
    global _users, _before
    with _lock:
        if _users == 0:
            _before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                torch.backends.cudnn.benchmark = _before
