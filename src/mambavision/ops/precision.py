"""The types of 8 and 16 bits, and the one that scans and steps are computed in."""

from __future__ import annotations

import torch

FLOAT8 = torch.float8_e4m3fn
HALVES = (torch.float16, torch.bfloat16)


def at_least_float32(*dtypes: torch.dtype) -> torch.dtype:
    """float64 where it is one of `dtypes`, else float32; plain Python, since exporters trace `torch.promote_types`."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
