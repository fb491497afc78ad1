"""Throughput, latency and memory of one network, by a protocol that is the same for all."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from mambavision.inference.cudnn import fastest_convolutions
from mambavision.measure.memory import OutOfMemoryError, fitting
from mambavision.measure.subjects import WAYS, Subject

WARM_UP_PASSES = 5  # at least
MIN_PASSES = 10
ROUNDS = 5  # of passes in a row
VERSIONS = ("mambavision", "triton", "timm")  # of what makes the speed beside PyTorch
LARGEST_BATCH = 4096
WORTH_DOUBLING = 1.03  # a larger batch must bring so much more images/s for the search to go on
DOUBLINGS_IN_VAIN = 2  # in a row, that end it: libraries change their ways with the size, and the first may be slower


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of a network at one batch size.

    Attributes:
        model: its name.
        way: how it was made ready; see `subjects.WAYS`.
        dtype: type of weights and pictures.
        img_size: height and width in pixels.
        batch_size: pictures a pass.
        images_per_second: of passes in a row, of which the host prepares one while the device computes another; where
            the host computes itself, batch size over the median time of a pass.
        median_ms: median time of a pass, in milliseconds.
        p90_ms: the time that nine of ten passes keep.
        passes: how many were timed.
        first_seconds: time of the first pass, compiling included.
        peak_mib: most memory that PyTorch held on the device during a pass, in MiB, from the second on, since the first
            may compile and try algorithms; None on a CPU.
        parameters: number of parameters.
        macs: multiply-adds of one picture.
    """

    model: str
    way: str
    dtype: str
    img_size: tuple[int, int]
    batch_size: int
    images_per_second: float
    median_ms: float
    p90_ms: float
    passes: int
    first_seconds: float
    peak_mib: float | None
    parameters: int
    macs: int


def measure(subject: Subject, batch_size: int, *, seconds: float = 2.0) -> Measurement:
    """Time forward passes for at least `seconds` and `MIN_PASSES`, each waited for, after a warm-up of half of that.

    Devices that compute while the host goes on are then timed over passes in a row, for about as long. What is compiled
    is compiled for this batch size alone.

    Raises:
        OutOfMemoryError: the batch does not fit.
    """
    cuda = subject.device.type == "cuda"
    if WAYS[subject.way].compiled:
        torch.compiler.reset()  # else sizes would share a slower form, and past Dynamo's limit run eagerly in silence
    what = f"{subject.name} ({subject.way}, {subject.dtype}) with {batch_size} pictures at once"
    several = batch_size > 1
    smaller = "give a smaller --batch-size, or auto to have one found" if several else "give a smaller --img-size"
    with fitting(what, subject.device, smaller), fastest_convolutions(), torch.inference_mode():
        pictures = subject.pictures(batch_size)
        start = time.perf_counter()
        subject.run(pictures)
        _wait(subject.device)
        first = time.perf_counter() - start
        if cuda:  # before graphs are recorded, which take their memory once
            torch.cuda.reset_peak_memory_stats(subject.device)
        for _ in _passes(seconds / 2, WARM_UP_PASSES):
            subject.run(pictures)
            _wait(subject.device)
        times = []
        timed = _time_on_cuda if cuda else _time_on_host
        for _ in _passes(seconds, MIN_PASSES):
            times.append(timed(subject, lambda: subject.run(pictures)))
        median = statistics.median(times)
        in_a_row = median
        if subject.device.type != "cpu":
            each = max(MIN_PASSES, round(seconds / median)) // ROUNDS

            def passes() -> None:
                for _ in range(each):
                    subject.run(pictures)

            in_a_row = statistics.median(timed(subject, passes) for _ in range(ROUNDS)) / each
        peak = torch.cuda.max_memory_allocated(subject.device) / 2**20 if cuda else None
    return Measurement(
        model=subject.name,
        way=subject.way,
        dtype=subject.dtype,
        img_size=subject.img_size,
        batch_size=batch_size,
        images_per_second=batch_size / in_a_row,
        median_ms=1e3 * median,
        p90_ms=1e3 * statistics.quantiles(times, n=10, method="inclusive")[-1],  # not beyond the slowest
        passes=len(times),
        first_seconds=first,
        peak_mib=peak,
        parameters=subject.parameters,
        macs=subject.macs,
    )


class Search(NamedTuple):
    """What a search of the batch size came to.

    Attributes:
        measured: at each size, from 1 on.
        best: the one of most images a second.
        end: a sentence with the best size, and why the search went no further.
    """

    measured: list[Measurement]
    best: Measurement
    end: str


def search_batch_size(subject: Subject, *, seconds: float = 2.0) -> Search:
    """Measure at batch sizes that are doubled from 1 on.

    It ends where doubling twice brings less than 3 %, at 4096 pictures, or where memory does.

    Args:
        subject: what is measured.
        seconds: as for `measure`.

    Raises:
        OutOfMemoryError: not even one picture fits.
    """
    found = [measure(subject, 1, seconds=seconds)]
    worth_it = 0  # place of the last that was worth doubling for
    end = f"no larger batch than {LARGEST_BATCH} is tried"
    while found[-1].batch_size < LARGEST_BATCH:
        if len(found) > worth_it + DOUBLINGS_IN_VAIN:
            end = f"larger batches bring less than {WORTH_DOUBLING - 1:.0%}"
            break
        larger = 2 * found[-1].batch_size
        try:
            found.append(measure(subject, larger, seconds=seconds))
        except OutOfMemoryError:
            end = f"{larger} pictures at once do not fit on {subject.device}"
            break
        if found[-1].images_per_second >= WORTH_DOUBLING * found[worth_it].images_per_second:
            worth_it = len(found) - 1
    best = max(found, key=lambda measurement: measurement.images_per_second)
    return Search(found, best, f"Most images/s with {best.batch_size} at once; {end}.")


def describe_protocol(device: torch.device, seconds: float) -> dict[str, str]:
    """What a reader must know to compare: how it was timed, where, and with which versions."""
    in_a_row = "" if device.type == "cpu" else f"; images/s of {ROUNDS} rounds of passes in a row, about as long"
    described = {
        "protocol": f"random weights and pictures, channels-last; warm-up {seconds / 2:g} s ({WARM_UP_PASSES} passes "
        f"at least), then passes for {seconds:g} s ({MIN_PASSES} at least), each waited for: median and "
        f"90th percentile{in_a_row}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    described |= installed_versions(VERSIONS)
    described["device"] = describe_device(device)
    if device.type == "cuda":
        described["protocol"] += "; cuDNN chooses its algorithms by timing them"
        described |= {"cuda": str(torch.version.cuda), "clocks": _gpu_clocks(device)}
    return described


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of each of `packages` that is installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_device(device: torch.device) -> str:
    """The GPU's name, or the processor's and how many threads PyTorch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    model = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def _passes(seconds: float, least: int) -> Iterator[None]:
    end, count = time.perf_counter() + seconds, 0
    while count < least or time.perf_counter() < end:
        yield
        count += 1


def _time_on_host(subject: Subject, run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    _wait(subject.device)
    return time.perf_counter() - start


def _time_on_cuda(subject: Subject, run: Callable[[], object]) -> float:
    with torch.cuda.device(subject.device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
    _wait(subject.device)
    return start.elapsed_time(end) / 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _gpu_clocks(device: torch.device) -> str:
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem", "--format=csv,noheader"]
    query.append(f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}")  # PyTorch may number them otherwise
    if shutil.which(query[0]) is None:
        return "unknown"
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return f"{answer[0]} (SM before the first pass, SM at most, memory)" if answer else "unknown"
