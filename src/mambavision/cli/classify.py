"""`mambavision classify`: the likeliest classes of pictures, as a table, JSON or CSV."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mambavision.cli.arguments import add_batch_size, add_device, add_network, message_console, open_predictor, positive

if TYPE_CHECKING:
    from rich.console import Console

    from mambavision.inference.images import Picture
    from mambavision.inference.predictor import Prediction, Predictor

SUMMARY = "Say what is in pictures: files, folders, globs, or - for standard input."
STANDARD_INPUT = "-"


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="mambavision classify",
        description="Say what is in pictures. Without --model and --checkpoint the small model in the package is used.",
        epilog="Results go to stdout, everything else to stderr. Exit code 1: some pictures could not be read.",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="a picture, a folder (searched with its subfolders), a quoted glob such as 'in/**/*.jpg', "
        "or - for the bytes of one picture on standard input",
    )
    parser.add_argument("--samples", action="store_true", help="classify the photographs that ship with the package")
    add_network(parser)
    parser.add_argument("--top-k", type=positive, default=5, metavar="K", help="classes a picture (default: 5)")
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="default: table")
    add_device(parser)
    add_batch_size(parser, 16)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 when a picture or a path failed, 2 when nothing was given."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if not options.paths and not options.samples:
        parser.error("no pictures given: name files, folders or globs, - for standard input, or use --samples")

    # Before the first message, from which on an interrupt is likely: one that meets the `exec` of an import ends
    # `python -m` by the signal, whatever is returned.
    import rich.progress  # noqa: F401

    from mambavision.inference.picture_files import find_pictures, sample_pictures

    messages = message_console()
    pictures: list[Picture] = list(sample_pictures()) if options.samples else []
    failed = False
    for path in options.paths:
        found, problems = ([path], []) if path == STANDARD_INPUT else find_pictures([path])
        pictures += found
        for problem in problems:
            messages.print(problem)
            failed = True
    if not pictures:
        return 1

    predictor = open_predictor(options)
    messages.print(_introduction(predictor, options.model, options.checkpoint))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters becomes an error
        predictions = _classify(predictor, pictures, options.top_k, messages)
    {"table": _write_table, "json": _write_json, "csv": _write_csv}[options.format](predictions)
    return 1 if failed or any(prediction.error for prediction in predictions) else 0


def _classify(predictor: Predictor, pictures: list[Picture], top_k: int, messages: Console) -> list[Prediction]:
    """All predictions; errors are told as they come, over a progress bar where stderr is a terminal."""
    from dataclasses import replace

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("classifying", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not messages.is_terminal or len(pictures) <= predictor.batch_size
    predictions = []
    opened = (sys.stdin.buffer.read() if picture == STANDARD_INPUT else picture for picture in pictures)
    with Progress(*columns, console=messages, transient=True, disable=hidden) as progress:
        bar = progress.add_task("", total=len(pictures))
        for picture, prediction in zip(pictures, predictor.stream(opened, top_k), strict=True):
            if picture == STANDARD_INPUT:
                error = prediction.error and prediction.error.replace(prediction.source, "standard input", 1)
                prediction = replace(prediction, source="standard input", error=error)
            if prediction.error is not None:
                messages.print(prediction.error)
            predictions.append(prediction)
            progress.advance(bar)
    return predictions


def _introduction(predictor: Predictor, model: str | None, checkpoint: str | None) -> str:
    """Which network answers, what it knows and how good it is."""
    from mambavision.inference.predictor import PACKAGED_MODEL
    from mambavision.weights import WEIGHTS

    classes = f"{len(predictor.labels)} classes"
    if checkpoint is not None:
        return f"Model: {checkpoint}{f' ({model})' if model else ''}, {classes}, on {predictor.device}."
    name = model or PACKAGED_MODEL
    weights = WEIGHTS[name]
    accuracy = "" if weights.top1 is None else f" (top-1 accuracy {weights.top1:.4g} %)"
    if name != PACKAGED_MODEL:
        return f"Model: {name}, {classes}, trained on {weights.trained_on}{accuracy}, on {predictor.device}."
    return (
        f"Model: {name}, the small one in the package, trained on {weights.trained_on}{accuracy}, "
        f"on {predictor.device}.\n"
        f"It knows {classes}: {', '.join(predictor.labels)}. For the 1000 of ImageNet: --model mamba_vision_T."
    )


def _write_table(predictions: Iterable[Prediction]) -> None:
    from rich import box
    from rich.console import Console
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    from mambavision.inference.images import printable

    classified = [prediction for prediction in predictions if prediction.error is None]
    if not classified:
        return
    folder = _common_folder([prediction.source for prediction in classified])
    title = f"in {printable(folder)}" if folder else None
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("picture", overflow="fold", style="bold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column(no_wrap=True, width=20)
    for prediction in classified:
        name = Text(printable(prediction.source.removeprefix(folder)))
        for label, probability in zip(prediction.labels, prediction.probabilities, strict=True):
            bar = ProgressBar(total=1.0, completed=probability, width=20)
            table.add_row(name, Text(label), f"{probability:.1%}", bar)
            name = Text()
        table.add_section()
    Console().print(table)


def _common_folder(sources: list[str]) -> str:
    """The folder that all of several paths share, with its separator; empty when there is none."""
    try:
        folder = os.path.commonpath([os.path.dirname(source) for source in sources])
    except ValueError:  # absolute beside relative paths, or two drives
        return ""
    folder = os.path.join(folder, "")
    shared = len(sources) > 1 and all(source.startswith(folder) for source in sources)
    return folder if shared else ""


def _write_json(predictions: Iterable[Prediction]) -> None:
    records: list[dict[str, object]] = []
    for prediction in predictions:
        if prediction.error is not None:
            records.append({"source": prediction.source, "error": prediction.error})
            continue
        ranked = zip(prediction.labels, prediction.indices, prediction.probabilities, strict=True)
        classes = [{"label": label, "index": index, "probability": value} for label, index, value in ranked]
        records.append({"source": prediction.source, "classes": classes})
    json.dump(records, sys.stdout, indent=2)
    sys.stdout.write("\n")


def _write_csv(predictions: Iterable[Prediction]) -> None:
    from mambavision.inference.images import printable

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("source", "rank", "label", "index", "probability", "error"))
    for prediction in predictions:
        source = printable(prediction.source)
        if prediction.error is not None:
            writer.writerow((source, "", "", "", "", prediction.error))
        ranked = zip(prediction.labels, prediction.indices, prediction.probabilities, strict=True)
        for rank, (label, index, probability) in enumerate(ranked, 1):
            writer.writerow((source, rank, label, index, f"{probability:.6f}", ""))
