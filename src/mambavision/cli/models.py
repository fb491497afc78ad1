"""`mambavision models`: the variants with their size, cost, accuracy and license."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambavision.config import MambaVisionConfig
    from mambavision.models.complexity import Complexity
    from mambavision.weights import WeightSpec

SUMMARY = "List the models: parameters, multiply-adds, resolution, accuracy, license."


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="mambavision models",
        description="List the models that have published weights. Parameters and multiply-adds are counted, "
        "the scan's and attention's products included, which published figures leave out.",
    )
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: table")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    options = build_parser().parse_args(argv)

    from mambavision.weights import WEIGHTS

    rows = [_row(weights) for weights in WEIGHTS.values()]
    if options.format == "json":
        json.dump(rows, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _write_table(rows)
    return 0


def _row(weights: WeightSpec) -> dict[str, Any]:
    from mambavision.config import get_config

    config = get_config(weights.variant)
    cost = _cost(config)
    return {
        "model": weights.variant,
        "parameters": cost.parameters,
        "macs": cost.macs,
        "img_size": list(config.preprocessing.img_size),
        "top1": weights.top1,
        "top5": weights.top5,
        "trained_on": weights.trained_on,
        "license": weights.license,
        "url": weights.url,
    }


@functools.cache  # some variants differ in their training alone
def _cost(config: MambaVisionConfig) -> Complexity:
    from mambavision.models.classifier import MambaVision
    from mambavision.models.complexity import count_complexity

    return count_complexity(MambaVision(config, device="meta"))


def _write_table(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True, style="bold")
    for heading in ("params M", "MACs G", "px", "top-1 %", "top-5 %"):
        table.add_column(heading, justify="right")
    table.add_column("license of weights", no_wrap=True)
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['macs'] / 1e9:.3g}",
            str(row["img_size"][0]),
            _percent(row["top1"]),
            _percent(row["top5"]),
            row["license"],
        )
    Console().print(table)
    Console(highlight=False).print(
        "Accuracy: ImageNet-1K validation, as published; nano_32: CIFAR-10 test, measured.\n"
        "21k: pre-trained on ImageNet-21K. Layer by layer: mambavision info MODEL."
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
