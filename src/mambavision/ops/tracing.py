"""Who is tracing the code that runs."""

from __future__ import annotations

from collections.abc import Callable

import torch


def _is_exporting() -> bool:
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


# Whether torch.export runs the code, and not torch.compile or nobody. Dynamo calls it while it traces: before PyTorch
# 2.12 it takes PyTorch's own function to be true in every compilation. PyTorch cannot tell a strict export from a
# compilation before 2.8, nor any export before 2.7.
is_exporting: Callable[[], bool] = torch.compiler.assume_constant_result(_is_exporting)  # type: ignore[no-untyped-call]
