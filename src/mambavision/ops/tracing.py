"""Who is tracing the code that runs."""

from __future__ import annotations

import torch


@torch.compiler.assume_constant_result  # Dynamo before PyTorch 2.12 takes is_exporting to be true in every compilation
def is_exporting() -> bool:
    """Whether torch.export runs the code, and not torch.compile or nobody.

    PyTorch cannot tell a strict export from a compilation before 2.8, nor any export before 2.7.
    """
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()
