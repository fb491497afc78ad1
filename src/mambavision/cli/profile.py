"""`mambavision profile`: where a network spends its time."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from mambavision.cli.arguments import TYPES, add_device, image_size, positive

if TYPE_CHECKING:
    from mambavision.measure.profiling import Share

SUMMARY = "Show where a model spends its time: parts and operations."


_BAR = 16  # columns of a bar


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="mambavision profile",
        description="Time the parts of a model in eager PyTorch, with random weights, and list what costs most.",
        epilog="Each part is timed to its end, so work that a GPU would overlap is added up.",
    )
    parser.add_argument("model", metavar="MODEL", help="a name that `mambavision models` lists")
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="pictures a pass (default: 1)")
    parser.add_argument("--dtype", choices=TYPES, default="float32", help="default: float32")
    parser.add_argument(
        "--img-size", type=image_size, metavar="SIZE", help="picture side, or HEIGHTxWIDTH (default: the model's own)"
    )
    add_device(parser)
    parser.add_argument("--top", type=positive, default=15, metavar="K", help="operations listed (default: 15)")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: table")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 when it does not fit into memory."""
    options = build_parser().parse_args(argv)

    from mambavision.config import get_config

    get_config(options.model)  # before torch is imported: a mistyped name answers at once

    from mambavision.inference.predictor import find_device
    from mambavision.measure.memory import OutOfMemoryError, fitting
    from mambavision.measure.profiling import profile_operations, profile_parts
    from mambavision.measure.subjects import prepare
    from mambavision.measure.timing import VERSIONS, describe_device, installed_versions

    device = find_device(options.device)
    if device.type == "cpu":  # else PyTorch's profiler, which reads this at its start, calls a missing GPU an error
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        subject = prepare(options.model, way="eager", dtype=options.dtype, device=device, img_size=options.img_size)
        what = f"{options.model} with {options.batch_size} pictures at once"
        with fitting(what, device, f"give a smaller {'--batch-size' if options.batch_size > 1 else '--img-size'}"):
            pictures = subject.pictures(options.batch_size)
            parts = profile_parts(subject.model, pictures)
            operations = profile_operations(subject.model, pictures, top=options.top)
    except OutOfMemoryError as error:
        print(f"mambavision profile: {error}", file=sys.stderr)
        return 1
    if options.format == "json":
        record = {"model": options.model, "dtype": options.dtype, "shape": list(pictures.shape)}
        record |= {"device": describe_device(device), **installed_versions(("torch", *VERSIONS))}
        tables = {"parts": [asdict(row) for row in parts], "operations": [asdict(row) for row in operations]}
        json.dump({**record, **tables}, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return 0
    height, width = subject.img_size
    what = f"{options.model}, {options.batch_size} x {height} x {width} px, {options.dtype}, {device}"
    _write_table(what, "part", parts)
    _write_table("", "kernel" if device.type == "cuda" else "operation", operations)
    return 0


def _write_table(title: str, what: str, rows: Sequence[Share]) -> None:
    from rich import box
    from rich.console import Console
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    console = Console()
    cells = [(f"{row.milliseconds:.3f}", f"{row.share:.1%}", f"{row.calls:g}") for row in rows]
    widths = [max(map(len, column)) for column in zip(("ms", "share", "calls"), *cells, strict=True)]
    # The name gives way where the terminal is narrow, never a number.
    room = console.width - sum(widths) - _BAR - 2 * 4
    table.add_column(what, overflow="ellipsis", max_width=max(12, min(44, room)), no_wrap=True)
    for column, width in zip(("ms", "share", "calls"), widths, strict=True):
        table.add_column(column, justify="right", no_wrap=True, min_width=width)
    table.add_column(no_wrap=True, width=_BAR)
    for row, numbers in zip(rows, cells, strict=True):
        table.add_row(row.name, *numbers, ProgressBar(total=1.0, completed=row.share, width=_BAR))
    console.print(table)
    console.print()
