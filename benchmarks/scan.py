"""The selective scan alone: every backend that runs here, at the sizes that the networks have.

    python benchmarks/scan.py

Forward, and forward with backward, in microseconds. On a GPU each is captured in a CUDA graph of several calls on
different inputs, so that neither launches nor a warm cache flatter it; on a CPU it is timed call by call.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mambavision.ops import selective_scan
from mambavision.ops.selective_scan import BACKENDS, choose_backend
from results_file import write_results

# Many short windows (levels 2 and 3 of T at batch 128), few long ones (512 px and beyond), one picture.
SIZES = ((128, 196, 160), (128, 49, 320), (8, 1024, 392), (1, 4096, 160), (1, 12544, 160), (1, 196, 160))
STATE = 8
SETS = 4  # inputs that take turns


def inputs(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random inputs as the network gives them: dt, B and C are parts of one projection."""
    batch, length, channels = size
    x = torch.randn(size, device=device, dtype=dtype)
    projected = torch.randn(batch, length, channels + 2 * STATE, device=device, dtype=dtype)
    dt, B, C = projected.split([channels, STATE, STATE], dim=-1)
    A = -torch.rand(channels, STATE, device=device) * 8
    return [x, dt, A, B, C, torch.ones(channels, device=device), torch.zeros(channels, device=device)]


def microseconds(run: Callable[[int], Any], device: torch.device, rounds: int) -> float:
    """Median time of `run(number)`, for numbers that take turns."""
    for number in range(SETS):
        run(number)
    times = []
    if device.type != "cuda":
        for number in range(rounds):
            start = time.perf_counter()
            run(number % SETS)
            times.append(1e6 * (time.perf_counter() - start))
        return statistics.median(times)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(SETS):
            run(number)
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / SETS)
    return statistics.median(times)


def sequential_microseconds(sets: list[list[Tensor]], device: torch.device, rounds: int) -> float:
    """The kernels' forward without chunks: one walk a sequence, however few there are."""
    from mambavision.ops.selective_scan import triton_op

    usual = triton_op.cut
    triton_op.cut = lambda _, length, channels, training=False: usual(10**6, length, channels, training=training)
    try:
        return microseconds(lambda number: selective_scan(*sets[number], backend="triton"), device, rounds)
    finally:
        triton_op.cut = usual


def measure(
    size: tuple[int, int, int], dtype: torch.dtype, backend: str, device: torch.device, rounds: int
) -> dict[str, float]:
    """Forward alone, and forward with backward."""
    sets = [inputs(size, dtype, device) for _ in range(SETS)]
    leaves = [[tensor.detach().requires_grad_() for tensor in tensors] for tensors in sets]
    grad_y = torch.randn(size, device=device, dtype=dtype)

    def train(number: int) -> None:
        y = selective_scan(*leaves[number], backend=backend)
        torch.autograd.grad(y, leaves[number], grad_y)

    row: dict[str, float] = {}
    with torch.no_grad():
        forward = microseconds(lambda number: selective_scan(*sets[number], backend=backend), device, rounds)
        row["forward_us"] = round(forward, 1)
        if backend == "triton" and size[0] == 1:  # few sequences, where chunks matter
            row["sequential_us"] = round(sequential_microseconds(sets, device, rounds), 1)
    row["training_us"] = round(microseconds(train, device, rounds), 1)
    return row


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["bfloat16", "float32"]
    )
    parser.add_argument(
        "--backend", nargs="+", default=[row.name for row in BACKENDS if row.name not in ("meta", "reference")]
    )
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many of the sizes")
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    refusals: set[str] = set()  # said once, not for each size and type
    for name in arguments.dtype:
        dtype = getattr(torch, name)
        for size in SIZES[: arguments.sizes]:
            for backend in arguments.backend:
                try:
                    choose_backend(torch.empty(1, 1, 1, device=device, dtype=dtype), backend, state=STATE)
                except RuntimeError as error:
                    if str(error) not in refusals:
                        print(error)
                        refusals.add(str(error))
                    continue
                rows.append(
                    {"batch": size[0], "length": size[1], "channels": size[2], "dtype": name, "backend": backend}
                    | measure(size, dtype, backend, device, arguments.rounds)
                )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(row.get(key, "-")) for key in columns))
    Console().print(table)
    write_results(
        "scan" if device.type == "cuda" else "scan_cpu",
        rows,
        note=f"N = {STATE}, {SETS} inputs in turn, median of {arguments.rounds} rounds"
        + (", captured in a CUDA graph." if device.type == "cuda" else "."),
    )


if __name__ == "__main__":
    main()
