"""How a GPU kernel cuts its work: a few candidates a shape, the first chosen by rule, the best found by measuring."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch

from mambavision.ops.launch import index_of, is_precompiling

_ROUNDS = 5
_CALLS = 8  # a round
MAX_CHOSEN = 4096  # choices that are kept; a network has some thirty for each size of batch


class Tile(NamedTuple):
    """What one program computes, and with what.

    Attributes:
        rows: of the output.
        columns: of the output.
        inner: of the product's inner index, a step.
        warps: threads over 32.
        stages: steps whose loads are under way at once.
        tail: columns of a second, narrower tile beside the first.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    tail: int = 0


# No tiles of ours: the library's product, and that of the kernel in CUDA C++ for GPUs of the Hopper generation.
LIBRARY, HOPPER = Tile(0, 0, 0, 0, 0), Tile(0, 0, 0, 0, 1)
# For little work: the first that gives enough programs to keep a large GPU busy, else the last. Few programs need many
# stages: in a network the weights come from memory, whose time an operand under way must cover.
SMALL = (Tile(64, 64, 64, 4, 4), Tile(64, 32, 128, 4, 4), Tile(64, 16, 128, 4, 5))
LEAST = Tile(64, 16, 128, 4, 4)  # for GPUs that have no room for the last
_BUSY = 72  # programs


def small_tiles(rows: int, columns: int) -> list[Tile]:
    """`SMALL` and `LEAST`, the likely best first."""
    programs = [-(-rows // tile.rows) * -(-columns // tile.columns) for tile in SMALL]
    first = next((tile for tile, count in zip(SMALL, programs, strict=True) if count >= _BUSY), SMALL[-1])
    return [first, *(tile for tile in (LEAST, *reversed(SMALL)) if tile != first)]


def common_unit(*lengths: int) -> int:
    """The largest of 16, 8, 4, 2, 1 that divides all: strides in such units tell a compiler what it may load."""
    return next(unit for unit in (16, 8, 4, 2, 1) if all(length % unit == 0 for length in lengths))


def that_fit(tiles: Sequence[Tile], bytes_each: int, device: torch.device) -> list[Tile]:
    """Those of `tiles` whose operands, of so many bytes an element, the shared memory of `device` holds; or the last.

    GPUs for games have 99 KiB a block, those for servers 163 or 227.
    """
    if device.type != "cuda":
        return list(tiles)
    room = _shared_memory(index_of(device))
    return [tile for tile in tiles if footprint(tile, bytes_each) <= room] or [tiles[-1]]


@cache
def _shared_memory(index: int) -> int:
    """Bytes that one program can have on a GPU, as Triton's launcher asks for them."""
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def footprint(tile: Tile, bytes_each: int) -> int:
    """Bytes of shared memory that the operands under way take at most."""
    return tile.stages * (tile.rows + tile.columns + tile.tail) * tile.inner * bytes_each


def is_large(rows: int, columns: int) -> bool:
    """Whether tiles of 128 x 128 suffice to keep a large GPU busy."""
    return -(-rows // 128) * -(-columns // 128) >= 132


class _Measuring(threading.local):
    """Whether the thread times candidates; others launch meanwhile."""

    now = False


_chosen: dict[Hashable, Tile] = {}
_lock = threading.Lock()  # of changes to it
_measuring = _Measuring()


@contextmanager
def measuring() -> Iterator[None]:
    """While it lasts, a shape met for the first time is timed with every candidate; afterwards the choice holds.

    Of what this thread launches; the choices are for all.
    """
    before, _measuring.now = _measuring.now, True
    try:
        yield
    finally:
        _measuring.now = before


def choose(key: Hashable, candidates: Sequence[Tile], run: Callable[[Tile], object]) -> Tile:
    """The tile for `key`, which names the kernel and all that its speed depends on.

    Args:
        key: of the process-wide table of choices, which forgets the oldest of very many.
        candidates: the tiles that fit, the one to take without measuring first.
        run: launches the kernel with a tile; may run any number of times.
    """
    if not _chosen and not _measuring.now:  # nor can sizes be looked up while a compiler traces with symbols for them
        return candidates[0]
    known = _chosen.get(key)
    if known is not None:
        return known
    if _measuring.now and is_precompiling():
        for tile in candidates:
            run(tile)
        return candidates[0]
    if not _measuring.now or len(candidates) == 1 or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    best = min(candidates, key=lambda tile: _milliseconds(run, tile))
    with _lock:
        if len(_chosen) >= MAX_CHOSEN:
            del _chosen[next(iter(_chosen))]
        _chosen[key] = best
    return best


@cache
def _aside(index: int) -> torch.cuda.Stream:
    """A stream of a GPU to record on; always the same, as each keeps the memory that it has used."""
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


def _milliseconds(run: Callable[[Tile], object], tile: Tile) -> float:
    """Shortest of a few rounds; infinite for a tile that the GPU has no room for.

    Each round replays a recording: launched one by one, small kernels would take the time of their launches.
    """
    from triton.runtime.errors import OutOfResources

    try:
        run(tile)
    except OutOfResources:
        return float("inf")
    graph, aside = torch.cuda.CUDAGraph(), _aside(torch.cuda.current_device())
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run(tile)  # libraries take their work space for the stream
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(_CALLS):
                run(tile)
        finally:  # else all that follows on the stream would be recorded
            graph.capture_end()
        times: list[float] = []
        for _ in range(_ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return min(times)
