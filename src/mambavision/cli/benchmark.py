"""`mambavision benchmark`: images a second, latency and memory of networks, in one run."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambavision.cli.arguments import (
    TYPES,
    UsageError,
    add_device,
    add_overwrite,
    check_free,
    image_size,
    message_console,
    positive,
)

if TYPE_CHECKING:
    from rich.console import Console

    from mambavision.measure.subjects import Subject
    from mambavision.measure.timing import Measurement

SUMMARY = "Measure speed and memory of networks, ours and timm's."
AUTO = "auto"
FLOAT8 = "optimized-float8"  # bfloat16 around its products, whatever --dtype says
NUMBERS = ("px", "batch", "images/s", "ms", "p90", "MiB")  # columns of the table
WAYS = ("eager", "compile", "fused", "fused-compile", "optimized", "optimized-full", FLOAT8)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="mambavision benchmark",
        description="Time forward passes of networks with random weights. Compare what one run measured, not two runs.",
        epilog="Every combination of models, ways, types and batch sizes is measured; Ctrl-C ends with what is done. "
        "Exit code 1: some of them could not be, for lack of memory or where they do not run."
        f" {FLOAT8} is bfloat16 around its 8-bit products, whatever --dtype says.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="our variants or timm's models")
    parser.add_argument(
        "--batch-size",
        nargs="+",
        type=_batch_size,
        default=[1],
        metavar="N",
        help="pictures a pass, or auto to double them while that brings more images/s (default: 1)",
    )
    parser.add_argument("--way", nargs="+", choices=WAYS, default=["eager"], help="how to run it (default: eager)")
    parser.add_argument("--dtype", nargs="+", choices=TYPES, default=["float32"], help="default: float32")
    parser.add_argument(
        "--img-size", type=image_size, metavar="SIZE", help="picture side, or HEIGHTxWIDTH (default: the model's own)"
    )
    add_device(parser)
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="for each measurement (default: 2)")
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="default: table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw images/s over batch size (PNG, SVG or PDF)")
    add_overwrite(parser, "a plot")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 when something could not be measured."""
    options = build_parser().parse_args(argv)
    if not 0 < options.seconds < float("inf"):
        raise UsageError(f"--seconds must be positive, got {options.seconds}.")
    if options.plot is not None:
        _check_plot(options.plot, overwrite=options.overwrite)

    from mambavision.inference.predictor import find_device
    from mambavision.measure.subjects import check_name, prepare
    from mambavision.measure.timing import describe_protocol

    for model in options.models:
        check_name(model)  # all of them, before the first is measured
    messages = message_console()
    device = find_device(options.device)
    protocol = describe_protocol(device, options.seconds)
    protocol |= {"date": date.today().isoformat(), "command": shlex.join(["mambavision", "benchmark", *argv])}
    for name, value in protocol.items():
        messages.print(f"{name}: {value}")
    found = _Found()
    try:
        _measure_models(options, partial(prepare, device=device, img_size=options.img_size), messages, found)
    except KeyboardInterrupt:
        found.problems += found.refused()
        found.problems.append("Stopped; what follows was measured before." if found.measured else "Stopped.")
        _report(options, protocol, messages, found)
        raise
    if found.refusals and not found.measured and not found.problems:
        raise UsageError(str(found.refusals[0][1])) from found.refusals[0][1]
    found.problems += found.refused()
    _report(options, protocol, messages, found)
    return 1 if found.problems else 0


class _Found:
    """What a run has come to: measurements, a sentence for each that could not be made, and what cannot be asked."""

    def __init__(self) -> None:
        self.measured: list[Measurement] = []
        self.problems: list[str] = []
        self.refusals: list[tuple[str, ValueError]] = []

    def refused(self) -> list[str]:
        """A sentence for each refusal; each once, not for every type."""
        return list(dict.fromkeys(f"{what}: {error}" for what, error in self.refusals))


def _measure_models(
    options: argparse.Namespace, prepare: Callable[..., Subject], messages: Console, found: _Found
) -> None:
    """Every combination, in turn."""
    from mambavision.measure.memory import OutOfMemoryError
    from mambavision.measure.subjects import first_line

    for model in options.models:
        for way in options.way:
            for dtype in ("bfloat16",) if way == FLOAT8 else options.dtype:
                try:
                    subject = prepare(model, way=way, dtype=dtype)
                except OutOfMemoryError as error:
                    found.problems.append(str(error))
                    continue
                except ValueError as error:
                    found.refusals.append((f"{model}, {way}", error))
                    continue
                except Exception as error:  # of a network of timm's; the others are still measured
                    what = f"{model}, {way}, {dtype}"
                    found.problems.append(f"{what} cannot be made: {type(error).__name__}: {first_line(error)}")
                    continue
                size = f"{subject.parameters / 1e6:.1f} M parameters, {subject.macs / 1e9:.2f} GMACs"
                messages.print(f"{model}, {way}, {dtype}: {size}")
                _measure_sizes(subject, options.batch_size, options.seconds, messages, found)


def _report(options: argparse.Namespace, protocol: dict[str, str], messages: Console, found: _Found) -> None:
    """Write what was measured, and say what was not."""
    for problem in found.problems:
        messages.print(problem)
    if not found.measured:
        return
    {"table": _write_table, "json": _write_json, "csv": _write_csv}[options.format](
        found.measured, {**protocol, "problems": found.problems}
    )
    if options.plot is not None:
        from mambavision.measure.plots import plot_speeds

        plot_speeds(found.measured, options.plot, title=protocol["device"])
        messages.print(f"plot: {options.plot}")


def _measure_sizes(
    subject: Subject, batch_sizes: Sequence[int | str], seconds: float, messages: Console, found: _Found
) -> None:
    """A subject at each batch size."""
    from mambavision.measure.memory import OutOfMemoryError
    from mambavision.measure.subjects import first_line
    from mambavision.measure.timing import measure, search_batch_size

    for batch_size in batch_sizes:
        label = f"{subject.name}, {subject.way}, {subject.dtype}, batch {batch_size}"
        with messages.status(label):
            try:
                if batch_size == AUTO:
                    search = search_batch_size(subject, seconds=seconds)
                    found.measured += search.measured
                    messages.print(f"{label}: {search.end}")
                else:
                    found.measured.append(measure(subject, int(batch_size), seconds=seconds))
            except OutOfMemoryError as error:
                found.problems.append(str(error))
            except Exception as error:  # of a network or a compiler; the others are still measured
                found.problems.append(f"{label} could not be measured: {type(error).__name__}: {first_line(error)}")


def _row(measurement: Measurement) -> dict[str, Any]:
    from dataclasses import asdict

    row = asdict(measurement)
    row["img_size"] = list(measurement.img_size)
    return row


def _write_table(measured: Sequence[Measurement], described: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    narrow: dict[str, Any] = {"padding": (0, 1, 0, 0), "pad_edge": False, "show_edge": False}  # two columns between two
    table = Table(title=described["device"], title_justify="left", box=box.SIMPLE_HEAD, **narrow)
    numbers = [_numbers(entry) for entry in measured]
    widths = [max(map(len, column)) for column in zip(NUMBERS, *numbers, strict=True)]
    # Names are folded where the terminal is narrow, numbers never: a part of one would look like another.
    room = console.width - sum(widths) - 2 * (len(widths) + 1)
    way = min(max(max(len(entry.way), len(entry.dtype)) for entry in measured), max(4, room // 2, room - 12))
    table.add_column("model, parameters, work", overflow="fold", max_width=max(4, room - way))
    table.add_column("way", overflow="fold", max_width=way)
    for column, width in zip(NUMBERS, widths, strict=True):
        table.add_column(column, justify="right", no_wrap=True, min_width=width)
    for entry, cells in zip(measured, numbers, strict=True):
        work = f"{entry.parameters / 1e6:.3g} M, {entry.macs / 1e9:.3g} GMACs"
        table.add_row(f"{entry.model}\n{work}", f"{entry.way}\n{entry.dtype}", *cells)
    console.print(table)


def _numbers(entry: Measurement) -> tuple[str, ...]:
    """The cells under `NUMBERS`."""
    height, width = entry.img_size
    return (
        f"{height}" if height == width else f"{height}x{width}",
        f"{entry.batch_size}",
        f"{entry.images_per_second:,.1f}" if entry.images_per_second < 100 else f"{entry.images_per_second:,.0f}",
        f"{entry.median_ms:.2f}",
        f"{entry.p90_ms:.2f}",
        "-" if entry.peak_mib is None else f"{entry.peak_mib:,.0f}",
    )


def _write_json(measured: Sequence[Measurement], described: dict[str, Any]) -> None:
    json.dump({**described, "rows": [_row(entry) for entry in measured]}, sys.stdout, indent=2)
    sys.stdout.write("\n")


def _write_csv(measured: Sequence[Measurement], described: dict[str, Any]) -> None:  # noqa: ARG001  (stderr has it)
    rows = [{**_row(entry), "img_size": "x".join(map(str, entry.img_size))} for entry in measured]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    sys.stdout.write(text.getvalue())


def _check_plot(path: Path, *, overwrite: bool) -> None:
    """Find out before measuring what would spoil the plot after it."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot must end in .png, .svg or .pdf, got {path}.")
    if not path.parent.is_dir():
        raise UsageError(f"--plot: there is no folder {path.parent}.")
    if path.is_dir():
        raise UsageError(f"--plot: {path} is a folder; name a file.")
    check_free(path, overwrite=overwrite, option="--plot")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--plot: files cannot be written to {path.parent}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install matplotlib.")


def _batch_size(text: str) -> int | str:
    return AUTO if text == AUTO else positive(text)


_batch_size.__name__ = "batch size"
