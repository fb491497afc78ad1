"""A file is written beside its place, reloaded, compared with PyTorch on photographs, and only then put there."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mambavision.export.graph import has_classes
from mambavision.export.pictures import as_input, decoded_photographs, in_batches, photographs
from mambavision.inference.fuse import check_network
from mambavision.models.backbone import MambaVisionBackbone
from mambavision.models.classifier import MambaVision
from mambavision.models.modes import evaluating

# What a reloaded file does: pictures in, outputs as float32 on the CPU.
Run: TypeAlias = Callable[[Tensor], Sequence[Tensor]]

# Largest difference that is taken for rounding, of the largest value of an output.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "int8": 0.35}
# Likewise, where pixels differ by a grey level here and there: of logits, and of maps, whose single values do not
# average a picture.
RESIZING = {"logits": 1e-2, "maps": 0.1}
# Share of the photographs whose likeliest class must be PyTorch's. In the other types the bound above says it all.
LEAST_AGREEMENT = {"int8": 0.75}
_TIMED_RUNS = 5


class ExportError(RuntimeError):
    """A network that cannot be exported; the message is one sentence with the reason."""


class DifferenceError(ExportError):
    """The file's outputs differ from PyTorch's, so it was not kept."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written and how it compares.

    Attributes:
        path: the file.
        runtime: what it was reloaded in.
        dtype: type of its weights and of what it computes.
        size: its bytes, with those of the weights where these lie beside it.
        nodes: operations in the graph.
        error: largest difference to PyTorch on the sample photographs, relative to the largest value of its output.
        agreement: share of the photographs whose likeliest class is PyTorch's; None for a network without
            classes.
        milliseconds: median of a call with one picture (or with the batch that the file is for).
        calibration: in words, what int8 was calibrated on; None for other types.
    """

    path: Path
    runtime: str
    dtype: str
    size: int
    nodes: int
    error: float
    agreement: float | None
    milliseconds: float
    calibration: str | None = None


def check_model(model: object) -> None:
    """Refuse what cannot be exported.

    Raises:
        TypeError: no network of this package.
        ValueError: an optimised one, weights in half precision, or channels that photographs do not have.
    """
    network = check_network(model, "Export takes a network of create_model")
    if hasattr(network, "compute_dtype"):
        raise ValueError("An optimised network cannot be exported; export the model that it was made of.")
    dtype = next(network.parameters()).dtype
    if dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"The weights are {dtype}; export model.float(), and let `dtype` choose the file's type.")
    if network.config.in_chans not in (1, 3):
        raise ValueError(
            f"An export is compared on photographs, which have 1 or 3 channels, and the model takes "
            f"{network.config.in_chans}; such a network cannot be exported here."
        )


@contextmanager
def _without_tensorfloat() -> Iterator[None]:
    """Float32 products and convolutions on a GPU as exact as elsewhere, so that a difference is the file's."""
    kinds: tuple[Any, ...] = (getattr(torch.backends.cudnn, "conv", None), torch.backends.cuda.matmul)
    name: str = "fp32_precision"
    exact: str | bool = "ieee"
    if not hasattr(kinds[0], name):  # PyTorch older than 2.9, whose successors take either names, but not both
        kinds, name, exact = (torch.backends.cudnn, torch.backends.cuda.matmul), "allow_tf32", False
    before = [getattr(kind, name) for kind in kinds]
    try:
        for kind in kinds:
            setattr(kind, name, exact)
        yield
    finally:
        for kind, value in zip(kinds, before, strict=True):
            setattr(kind, name, value)


@contextmanager
def packages(what: str, install: str) -> Iterator[None]:
    """Imports inside become one sentence when something is not installed.

    Args:
        what: needs the packages.
        install: arguments for `pip install`.

    Raises:
        ExportError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or str(error)).partition(".")[0]
        raise ExportError(f"{what} needs {missing}, which is not installed: pip install {install}.") from error


def write_checked(
    model: MambaVisionBackbone,
    path: Path,
    *,
    runtime: str,
    dtype: str,
    uint8: bool,
    write: Callable[[Path], int],
    load: Callable[[Path], Run],
    decoded: bool = False,
    batch_size: int | None = None,
    calibration: str | None = None,
) -> Report:
    """Write to a folder of its own, reload, compare, and move what was written to `path` and beside it.

    Args:
        model: computes what is expected.
        path: of the file; missing folders are made.
        runtime: what it is reloaded in, in messages.
        dtype: decides the tolerance.
        uint8: what the file takes.
        decoded: whether it takes the photographs as they are, to resize them itself.
        write: makes the file, and others beside it with names of their own; gives the number of its operations.
        load: opens the file.
        batch_size: of a file that takes so many pictures of the model's own size and no others.
        calibration: for the report.

    Raises:
        DifferenceError: the file computes something else; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        beside = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as problem:  # by the name that was asked for
        raise OSError(problem.errno, problem.strerror, str(path)) from problem
    with beside as folder:
        draft = Path(folder) / path.name
        nodes = write(draft)
        run = load(draft)
        pairs = decoded_photographs(model) if decoded else _pairs(model, uint8=uint8, batch_size=batch_size)
        with _without_tensorfloat():
            error, agreement = _compare(model, run, pairs)
        milliseconds = _time(run, pairs[0][1] if batch_size else pairs[0][1][:1])
        del run
        resizing = RESIZING["logits" if isinstance(model, MambaVision) else "maps"] if decoded else 0.0
        if not error <= max(TOLERANCES[dtype], resizing):  # NaN included
            raise DifferenceError(
                f"{path} was not kept: {runtime}'s outputs differ from PyTorch's by {error:.1e} of the largest value."
            )
        if agreement is not None and agreement < LEAST_AGREEMENT.get(dtype, 0):
            raise DifferenceError(
                f"{path} was not kept: {runtime} gives only {agreement:.0%} of the sample photographs PyTorch's class."
            )
        files = sorted(Path(folder).iterdir(), key=lambda file: file == draft)  # the graph last
        size = sum(file.stat().st_size for file in files)
        for file in files:
            os.replace(file, path.with_name(file.name))
    return Report(
        path=path,
        runtime=runtime,
        dtype=dtype,
        size=size,
        nodes=nodes,
        error=error,
        agreement=agreement,
        milliseconds=milliseconds,
        calibration=calibration,
    )


def _pairs(model: MambaVisionBackbone, *, uint8: bool, batch_size: int | None) -> list[tuple[Tensor, Tensor]]:
    """(normalised pictures, the same as the file takes them): all photographs in one batch and one at another size."""
    normalised = photographs(model)
    if batch_size is not None:
        batches = in_batches(normalised, batch_size)
        return [(batch, as_input(model, batch, uint8=uint8)) for batch in batches]
    height, width = normalised.shape[-2:]
    other = normalised[:1, :, : height - height // 5, : width - width // 3]
    return [(batch, as_input(model, batch, uint8=uint8)) for batch in (normalised, other)]


def _compare(model: MambaVisionBackbone, run: Run, pairs: list[tuple[Tensor, Tensor]]) -> tuple[float, float | None]:
    """Largest relative error and, where there are classes, the share of equal classes."""
    weight = next(model.parameters())
    errors, equal = [], []
    for inputs, fed in pairs:
        with evaluating(model), torch.inference_mode():
            expected = model(inputs.to(weight))
        maps = [expected] if isinstance(expected, Tensor) else expected
        for ours, theirs in zip(maps, run(fed), strict=True):
            reference = ours.float().cpu()
            errors.append((theirs - reference).abs().max() / reference.abs().max())
            if has_classes(model):
                equal.append(theirs.argmax(-1) == reference.argmax(-1))
    return torch.stack(errors).max().item(), torch.cat(equal).float().mean().item() if equal else None


def _time(run: Run, pictures: Tensor) -> float:
    times = []
    for _ in range(_TIMED_RUNS):
        started = time.perf_counter()
        run(pictures)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)
