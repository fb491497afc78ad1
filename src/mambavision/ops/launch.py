"""How the ops launch their Triton kernels, and how these are compiled side by side before the first launch."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch.library import wrap_triton

_pending: dict[Hashable, Future[Any]] | None = None
_pool: ThreadPoolExecutor | None = None


def launcher(kernel: Any) -> Any:
    """`kernel`, to be called as `launcher(kernel)[grid](...)` inside a `triton_op`."""
    return wrap_triton(kernel) if _pending is None else _Compiled(kernel)


@contextmanager
def precompiling() -> Iterator[None]:
    """While it lasts, kernels are not launched but compiled, on all processors; it ends when all of them are.

    What the ops return meanwhile is memory as it comes. Compiling a kernel takes up to a second, and a network has
    tens of them.
    """
    global _pending, _pool
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as _pool:
        _pending = {}
        try:
            yield
        finally:
            pending, _pending = _pending, None
        for future in pending.values():
            future.result()


def is_precompiling() -> bool:
    """Whether kernels are compiled and not launched."""
    return _pending is not None


class _Compiled:
    """A kernel whose launch compiles it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def submit(*arguments: Any, **settings: Any) -> None:
            assert _pending is not None
            assert _pool is not None
            key = (self.kernel, *map(_specialised, arguments), *sorted(settings.items()))
            if key not in _pending:
                _pending[key] = _pool.submit(_warm_up, self.kernel, arguments, settings, grid)

        return submit


def _warm_up(kernel: Any, arguments: tuple[Any, ...], settings: dict[str, Any], grid: tuple[int, ...]) -> None:
    from triton.runtime.errors import OutOfResources

    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    with torch.cuda.device(tensors[0].device):
        try:
            kernel.warmup(*arguments, grid=grid, **settings)
        except OutOfResources:  # a tile too large for this GPU; `tiles.choose` finds out when it launches it
            return


def _specialised(argument: Any) -> Any:
    """What the compiler knows of an argument: more than this makes no other kernel."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument >= 2**31
    return type(argument)
