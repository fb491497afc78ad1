"""How the ops launch their Triton kernels, and how these are compiled side by side before the first launch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import getsource
from typing import Any, NamedTuple

import torch
from torch.library import wrap_triton

WORKERS = 10  # threads that compile; in more the sixth of Triton's compiler that is Python would wait for itself
NATIVE_WORKERS = 10  # others, for compilers that are no Python, behind which Triton's slowest kernel would be the last


class _Asked(NamedTuple):
    compile: Callable[[], object]
    length: int
    begun: Future[object] | None


class _Precompiling(threading.local):
    """What is to be compiled for the thread that asked for it, and by whom at once; others launch meanwhile."""

    asked: dict[Hashable, _Asked] | None = None
    native: ThreadPoolExecutor | None = None


_precompiling = _Precompiling()


def index_of(device: torch.device) -> int:
    """Number of a GPU; of `cuda` without one that of the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


def launcher(kernel: Any) -> Any:
    """`kernel`, to be called as `launcher(kernel)[grid](...)` inside a `triton_op`."""
    if is_precompiling():
        return _NotedDown(kernel)
    wrapped = wrap_triton(kernel)
    eager = wrapped is kernel  # else it is traced, and whoever compiles the graph sees to the device
    return _OnItsDevice(kernel) if eager and torch.cuda.device_count() > 1 else wrapped


@contextmanager
def precompiling() -> Iterator[None]:
    """While it lasts, kernels are not launched; at its end those that were asked for are compiled, side by side.

    What the ops return meanwhile is memory as it comes. Compiling a kernel takes up to two seconds, and a network has
    tens of them. Most not before the end, as compilers and the network would wait for each other's Python.
    """
    asked: dict[Hashable, _Asked] = {}
    processors = os.cpu_count() or 1
    with (
        ThreadPoolExecutor(max_workers=min(NATIVE_WORKERS, processors)) as native,
        ThreadPoolExecutor(max_workers=min(WORKERS, processors)) as pool,
    ):
        _precompiling.asked, _precompiling.native = asked, native
        try:
            try:
                yield
            finally:
                _precompiling.asked = _precompiling.native = None
            # The longest source first: it is the slowest to compile.
            slowest_first = sorted(asked.values(), key=lambda kernel: kernel.length, reverse=True)
            for begun in [kernel.begun or pool.submit(kernel.compile) for kernel in slowest_first]:
                begun.result()
        except BaseException:
            for each in (native, pool):
                each.shutdown(cancel_futures=True)
            raise


def is_precompiling() -> bool:
    """Whether kernels are compiled and not launched."""
    return _precompiling.asked is not None


def note(key: Hashable, compile: Callable[[], object], *, length: int = 0, at_once: bool = False) -> None:
    """Have a kernel compiled until the end of `precompiling`, once for each key.

    Args:
        key: names the kernel and all that is special about it.
        compile: makes and keeps it; called by any thread.
        length: of its source, by which the slow ones come first; without it, among the last.
        at_once: whether to begin before the end: for a compiler that is no Python.
    """
    asked, native = _precompiling.asked, _precompiling.native
    assert asked is not None
    assert native is not None
    if key not in asked:
        asked[key] = _Asked(compile, length, native.submit(compile) if at_once else None)


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


class _NotedDown:
    """A kernel whose launches are noted down, for `precompiling` to compile."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def take(*arguments: Any, **settings: Any) -> None:
            known = (
                type(argument) if parameter.do_not_specialize else _specialised(argument)
                for parameter, argument in zip(self.kernel.params, arguments, strict=False)
            )
            key = (self.kernel, *known, *sorted(settings.items()))
            if _precompiling.asked is not None and key not in _precompiling.asked:
                few = tuple(map(_stand_in, arguments))
                length = len(getsource(self.kernel.fn))
                note(key, partial(_warm_up, self.kernel, few, settings, grid), length=length)

        return take


def _warm_up(kernel: Any, arguments: tuple[Any, ...], settings: dict[str, Any], grid: tuple[int, ...]) -> None:
    from triton.runtime.errors import OutOfResources

    device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
    with torch.cuda.device(device):
        try:
            compiled = kernel.warmup(*arguments, grid=grid, **settings)
            _ = compiled.run  # builds, with a C compiler, what launches it; else the first launch would
        except OutOfResources:  # a tile too large for this GPU; `tiles.choose` finds out when it launches it
            return


def _stand_in(argument: Any) -> Any:
    """A tensor without memory that the compiler cannot tell from `argument`."""
    aligned = isinstance(argument, torch.Tensor) and argument.data_ptr() % 16 == 0
    return argument.new_empty(0) if aligned else argument


def _specialised(argument: Any) -> Any:
    """What the compiler knows of an argument: more than this makes no other kernel."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument >= 2**31
    return type(argument)
