"""How the ops launch their Triton kernels, and how these are compiled side by side before the first launch."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.library import wrap_triton


class _Precompiling(threading.local):
    """What is being compiled for the thread that asked for it; others launch meanwhile."""

    pending: dict[Hashable, Future[Any]] | None = None
    pool: ThreadPoolExecutor


_precompiling = _Precompiling()


def launcher(kernel: Any) -> Any:
    """`kernel`, to be called as `launcher(kernel)[grid](...)` inside a `triton_op`."""
    if _precompiling.pending is not None:
        return _Compiled(kernel)
    wrapped = wrap_triton(kernel)
    eager = wrapped is kernel  # else it is traced, and whoever compiles the graph sees to the device
    return _OnItsDevice(kernel) if eager and torch.cuda.device_count() > 1 else wrapped


@contextmanager
def precompiling() -> Iterator[None]:
    """While it lasts, kernels are not launched but compiled, on all processors; it ends when all of them are.

    What the ops return meanwhile is memory as it comes. Compiling a kernel takes up to a second, and a network has
    tens of them.
    """
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        pending: dict[Hashable, Future[Any]] = {}
        _precompiling.pending, _precompiling.pool = pending, pool
        try:
            yield
        finally:
            _precompiling.pending = None
        for future in pending.values():
            future.result()


def is_precompiling() -> bool:
    """Whether kernels are compiled and not launched."""
    return _precompiling.pending is not None


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A kernel's argument without gaps, or None, which kernels do not read."""
    return None if tensor is None else tensor.contiguous()


class _OnItsDevice:
    """A kernel that runs on the GPU where its tensors are; Triton would take the current one."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **settings: Any) -> None:
            device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                self.kernel[grid](*arguments, **settings)

        return launch


class _Compiled:
    """A kernel whose launch compiles it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def submit(*arguments: Any, **settings: Any) -> None:
            pending = _precompiling.pending
            assert pending is not None
            key = (self.kernel, *map(_specialised, arguments), *sorted(settings.items()))
            if key not in pending:
                pending[key] = _precompiling.pool.submit(_warm_up, self.kernel, arguments, settings, grid)

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
