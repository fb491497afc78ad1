"""Who is tracing the code that runs."""

from __future__ import annotations

import torch

if torch.__version__ >= "2.12":  # compared as versions
    from torch.compiler import is_exporting
else:

    def is_exporting() -> bool:
        """Whether torch.export runs the code, and not torch.compile or nobody.

        Dynamo takes PyTorch's own function to be true in every compilation, but not what it reads. A strict export
        cannot be told from a compilation before PyTorch 2.8, nor any export before 2.7.
        """
        return getattr(torch.compiler, "_is_exporting_flag", False)


def is_jit_tracing() -> bool:
    """Whether torch.jit.trace runs the code, whose graphs hold no Python."""
    return bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call]


__all__ = ["is_exporting", "is_jit_tracing"]
