"""`mambavision neighbours`: the pictures of a table that are nearest to others, by cosine."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mambavision.cli.arguments import UsageError, add_batch_size, add_device, open_predictor, positive

if TYPE_CHECKING:
    from mambavision.inference.features import Features, Neighbour
    from mambavision.inference.predictor import Predictor

SUMMARY = "Find the pictures most like others in a table that embed wrote."


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="mambavision neighbours",
        description="List the nearest pictures of a table by cosine, best first; a picture is not its own neighbour.",
        epilog="Exit code 1: some pictures could not be read.",
    )
    parser.add_argument("features", type=Path, metavar="FEATURES", help="a .npz or .parquet of `mambavision embed`")
    parser.add_argument(
        "paths", nargs="*", metavar="IMAGE", help="a picture, a folder or a quoted glob (default: all of the table)"
    )
    parser.add_argument("-k", type=positive, default=5, metavar="K", help="neighbours a picture (default: 5)")
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="default: table")
    parser.add_argument("--model", metavar="NAME", help="the network of the table (default: as the table says)")
    parser.add_argument("--checkpoint", metavar="FILE", help="its weights, if they have moved")
    add_device(parser)
    add_batch_size(parser, 32)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 when a picture or a path failed."""
    options = build_parser().parse_args(argv)

    from mambavision.inference.features import load_features
    from mambavision.inference.picture_files import find_pictures

    if not options.paths and (options.model is not None or options.checkpoint is not None):
        raise UsageError("--model and --checkpoint are for pictures, and none is given: the table needs neither.")
    features = load_features(options.features)
    found, problems = find_pictures(options.paths)
    for problem in problems:
        print(problem, file=sys.stderr)
    failed = bool(problems)
    if not options.paths:
        queries, vectors = list(features.paths), list(features.vectors)
    elif not found:
        return 1
    else:
        from mambavision.inference.embed import embed

        queries, vectors = [], []
        for embedding in embed(_predictor(features, options), found):
            if embedding.vector is None:
                print(embedding.error, file=sys.stderr)
                failed = True
            else:
                queries.append(embedding.source)
                vectors.append(embedding.vector)
        if not queries:
            return 1
    nearest = features.nearest(vectors, options.k, queries=queries)
    {"table": _write_table, "json": _write_json, "csv": _write_csv}[options.format](queries, nearest)
    return 1 if failed else 0


def _predictor(features: Features, options: argparse.Namespace) -> Predictor:
    """The network that made the table; UsageError when it is another one."""
    from mambavision.inference.embed import describe, same_network

    if options.model is None and options.checkpoint is None:
        options.model, options.checkpoint = features.metadata.get("model"), features.metadata.get("checkpoint")
        if options.model is None and options.checkpoint is None:
            raise UsageError(
                f"{options.features} does not say which network made it: name that with --model or --checkpoint."
            )
        if options.checkpoint is not None and not Path(options.checkpoint).exists():
            raise UsageError(
                f"{options.features} was made with {options.checkpoint}, which is not there: "
                "name these weights with --checkpoint."
            )
    predictor = open_predictor(options)
    if not same_network(describe(predictor), features.metadata):
        raise UsageError(f"{options.features} was made with other weights; name them with --model or --checkpoint.")
    return predictor


def _write_table(queries: list[str], nearest: list[list[Neighbour]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mambavision.inference.images import printable

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("picture", overflow="fold", style="bold")
    table.add_column("neighbour", overflow="fold")
    table.add_column("cosine", justify="right", no_wrap=True)
    for query, neighbours in zip(queries, nearest, strict=True):
        name = Text(printable(query))
        for neighbour in neighbours:
            table.add_row(name, Text(printable(neighbour.path)), f"{neighbour.cosine:.3f}")
            name = Text()
        table.add_section()
    Console().print(table)


def _write_json(queries: list[str], nearest: list[list[Neighbour]]) -> None:
    from dataclasses import asdict

    records = [
        {"picture": query, "neighbours": [asdict(neighbour) for neighbour in neighbours]}
        for query, neighbours in zip(queries, nearest, strict=True)
    ]
    print(json.dumps(records, indent=2))


def _write_csv(queries: list[str], nearest: list[list[Neighbour]]) -> None:
    from mambavision.inference.images import printable

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("picture", "rank", "neighbour", "cosine"))
    for query, neighbours in zip(queries, nearest, strict=True):
        for rank, neighbour in enumerate(neighbours, 1):
            writer.writerow((printable(query), rank, printable(neighbour.path), neighbour.cosine))
