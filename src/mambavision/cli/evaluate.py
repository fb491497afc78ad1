"""`mambavision evaluate`: accuracy of a network on labelled pictures."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambavision.cli.arguments import (
    TYPES,
    UsageError,
    add_batch_size,
    add_device,
    add_network,
    open_predictor,
)

if TYPE_CHECKING:
    from mambavision.engine.evaluate import Evaluation

SUMMARY = "Measure the accuracy of a model on labelled pictures."


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="mambavision evaluate",
        description="Measure accuracy on labelled pictures, by default that of the model in the package.",
        epilog="Results go to stdout, everything else to stderr. Exit code 1: some pictures could not be read.",
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with val/CLASS/PICTURE (or validation, test), with val.npz, with CLASS/PICTURE, or a .npz file",
    )
    add_network(parser)
    add_device(parser)
    parser.add_argument(
        "--precision",
        choices=TYPES,
        default="float32",
        help="type of autocast (default: float32)",
    )
    add_batch_size(parser, 128)
    parser.add_argument(
        "--workers", type=int, default=4, metavar="N", help="processes that read pictures; 0 for none (default: 4)"
    )
    parser.add_argument("--per-class", action="store_true", help="add the top-1 accuracy of each class")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: table")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 when some pictures could not be read."""
    options = build_parser().parse_args(argv)
    from mambavision.data.folder import open_evaluation
    from mambavision.engine.evaluate import evaluate, evaluation_batches, match_classes
    from mambavision.inference.predictor import class_labels

    if options.workers < 0:
        raise UsageError(f"--workers must be at least 0, got {options.workers}.")
    predictor = open_predictor(options)
    pictures, matched = match_classes(open_evaluation(options.data), class_labels(predictor.config))
    print(f"{options.data}: {len(pictures):,} pictures. {matched}", file=sys.stderr)
    result = evaluate(
        predictor.model,
        evaluation_batches(
            pictures,
            predictor.model,
            batch_size=options.batch_size,
            workers=options.workers,
            device=predictor.device,
        ),
        num_classes=predictor.config.num_classes,
        device=predictor.device,
        precision=options.precision,
        channels_last=True,  # faster for convolutions, on CPUs too
    )
    for _, reason in result.bad:
        print(f"mambavision evaluate: {reason}", file=sys.stderr)
    if result.bad:
        print(f"{len(result.bad)} of {len(pictures)} pictures could not be read and are left out.", file=sys.stderr)
    model = options.checkpoint or options.model or "the model in the package"
    names = distinct(pictures.class_names)
    per_class = dict(zip(names, result.per_class, strict=True)) if options.per_class else {}
    if options.format == "json":
        print(json.dumps(_as_json(model, result, per_class), indent=2))
    else:
        _print_table(model, result, per_class)
    return 1 if result.bad else 0


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with the number of the class behind one that several have."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]


def _as_json(model: str, result: Evaluation, per_class: dict[str, float]) -> dict[str, Any]:
    report: dict[str, Any] = {
        "model": model,
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "count": result.count,
        "images_per_second": result.images_per_second,
        "bad": [name for name, _ in result.bad],
    }
    if per_class:
        report["per_class"] = {name: None if math.isnan(top1) else top1 for name, top1 in per_class.items()}
    return report


def _print_table(model: str, result: Evaluation, per_class: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=model)
    for column in ("top-1 / %", "top-5 / %", "loss", "pictures", "unreadable", "images/s"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{result.top1:.2f}",
        f"{result.top5:.2f}",
        f"{result.loss:.4f}",
        f"{result.count:,}",
        f"{len(result.bad):,}",
        f"{result.images_per_second:,.0f}",
    )
    console = Console()
    console.print(table)
    if per_class:
        classes = Table("class", "top-1 / %")
        for name, top1 in per_class.items():
            if not math.isnan(top1):
                classes.add_row(name, f"{top1:.2f}")
        console.print(classes)
