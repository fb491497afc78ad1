"""Mixed precision."""

from __future__ import annotations

import torch

AUTOCAST_TYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision as configured; for float32 a context that does nothing."""
    dtype = AUTOCAST_TYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
