"""The types of 8 and 16 bits, and the one that scans and steps are computed in."""

from __future__ import annotations

import torch

FLOAT8 = torch.float8_e4m3fn
HALVES = (torch.float16, torch.bfloat16)


def autocast_type(*tensors: torch.Tensor) -> torch.dtype | None:
    """The type that autocast gives products of tensors on a GPU; None where it is off, or one of them is float64."""
    if not torch.is_autocast_enabled("cuda") or any(tensor.dtype == torch.float64 for tensor in tensors):
        return None
    return torch.get_autocast_dtype("cuda")


def at_least_float32(*dtypes: torch.dtype) -> torch.dtype:
    """float64 where it is one of `dtypes`, else float32; plain Python, since exporters trace `torch.promote_types`."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
