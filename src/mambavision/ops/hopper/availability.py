"""Whether the kernels for Hopper GPUs run on a GPU, and what of it and of their operands they have to know."""

from __future__ import annotations

import warnings
from functools import cache

import torch

BYTES = 16  # where a copy may start, and from row to row, are multiples of so many


# A constant, since a compiler would trace what looks for the fault.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # PyTorch gives it no types
def fault(device: int) -> str | None:
    """Why the kernels cannot run on a GPU, or None. On a GPU that they are made for, a warning says it too."""
    return _fault(device)


@cache
def _fault(device: int) -> str | None:
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return "it is not of the Hopper generation"
    try:
        from mambavision.ops.hopper import build

        build.try_out(device)
    except ImportError:
        reason = "cuda-bindings is not installed (pip install cuda-bindings)"
    except Exception as error:  # whatever it is, the other kernels need nothing of it
        reason = f"{type(error).__name__}: {error}"
    else:
        return None
    warnings.warn(
        f"Products and attention run through other kernels, not through those made for this GPU: {reason}", stacklevel=3
    )
    return reason


@cache
def processors(device: int) -> int:
    """Multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
