"""`mambavision embed`: the vectors of many pictures as one table, continued where it was stopped."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mambavision.cli.arguments import (
    add_batch_size,
    add_device,
    add_network,
    add_overwrite,
    check_free,
    message_console,
    open_predictor,
)

if TYPE_CHECKING:
    from rich.console import Console

    from mambavision.inference.predictor import Predictor

SUMMARY = "Turn pictures into vectors, for search and clustering; see neighbours."


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="mambavision embed",
        description="Write the pooled vector of every picture into one table. Stopped in between, the same command "
        "continues: what is done is kept beside the output, its name with .partial.",
        epilog="Exit code 1: some pictures could not be read and are not in the table. 2: wrong use, or the table was "
        "there already.",
    )
    parser.add_argument("paths", nargs="+", metavar="DIR", help="a folder, a picture or a quoted glob")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="table to write, .npz or .parquet"
    )
    add_overwrite(parser, "a table")
    add_network(parser)
    add_device(parser)
    add_batch_size(parser, 32)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 when a picture or a path failed, UsageError when the table is there."""
    options = build_parser().parse_args(argv)

    from mambavision.inference.features import check_output
    from mambavision.inference.picture_files import find_pictures

    messages = message_console()
    check_output(options.output)
    check_free(options.output, overwrite=options.overwrite)
    pictures, problems = find_pictures(options.paths)
    for problem in problems:
        messages.print(problem)
    if not pictures:
        return 1
    predictor = open_predictor(options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters becomes an error
        return 1 if _embed(predictor, pictures, options, messages) or problems else 0


def _embed(predictor: Predictor, pictures: list[Path], options: argparse.Namespace, messages: Console) -> bool:
    """Whether some pictures have no vector; these are told as they come, over a progress bar in a terminal."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from mambavision.inference.embed import PARTIAL, Embedding, describe, embed_files

    metadata = describe(predictor, model=options.model, checkpoint=options.checkpoint)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
            bar = progress.add_task("embedding", total=len(pictures))

            def report(embedding: Embedding) -> None:
                if embedding.error is not None:
                    messages.print(embedding.error)
                progress.advance(bar)

            def resumed(count: int) -> None:
                messages.print(f"Continuing: {count} of {len(pictures)} pictures were done before.")

            features, bad = embed_files(
                predictor, pictures, options.output, metadata=metadata, report=report, resumed=resumed
            )
    except KeyboardInterrupt:
        partial = options.output.name + PARTIAL
        messages.print(f"Stopped; what is done is in {partial}, and the same command continues.")
        raise
    if not features.paths:
        print("No picture could be read; nothing was written.", file=sys.stderr)
    else:
        rows, channels = features.vectors.shape
        print(f"{options.output}: {rows} vectors of {channels} channels")
    return bool(bad)
