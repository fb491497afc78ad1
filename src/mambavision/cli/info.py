"""`mambavision info`: one model, layer by layer, without its weights."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from mambavision.cli.arguments import image_size

if TYPE_CHECKING:
    from mambavision.models.complexity import Complexity, LayerCost

SUMMARY = "Show one model layer by layer: shapes, parameters, multiply-adds."


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="mambavision info",
        description="Show one model block by block, for one picture. Nothing is downloaded and no memory is taken.",
        epilog="Multiply-adds are those of convolutions, linear layers, attention's two products and the scan.",
    )
    parser.add_argument("model", metavar="MODEL", help="a name that `mambavision models` lists")
    parser.add_argument(
        "--img-size", type=image_size, metavar="SIZE", help="picture side, or HEIGHTxWIDTH (default: the model's own)"
    )
    parser.add_argument("--layers", action="store_true", help="every layer inside the blocks too")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: table")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    options = build_parser().parse_args(argv)

    from mambavision.config import get_config

    config = get_config(options.model)  # before torch is imported: a mistyped name answers at once

    from mambavision.models.classifier import MambaVision
    from mambavision.models.complexity import count_complexity

    cost = count_complexity(MambaVision(config, device="meta"), options.img_size)
    rows = cost.layers if options.layers else cost.blocks
    if options.format == "json":
        record = {"model": options.model, "parameters": cost.parameters, "macs": cost.macs, "img_size": cost.img_size}
        json.dump({**record, "layers": [asdict(row) for row in rows]}, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _write_table(options.model, cost, rows)
    return 0


def _write_table(model: str, cost: Complexity, rows: Sequence[LayerCost]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    height, width = cost.img_size
    title = f"{model}, one picture of {height} x {width} px"
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=0, show_footer=True)
    table.add_column("layer", "total", overflow="fold")
    table.add_column("kind", no_wrap=True)
    table.add_column("output", no_wrap=True)
    table.add_column("parameters", f"{cost.parameters:,}", justify="right", no_wrap=True)
    table.add_column("MACs M", f"{cost.macs / 1e6:,.1f}", justify="right", no_wrap=True)
    for row in rows:
        shape = "x".join(map(str, row.output_shape))
        table.add_row(row.name, row.kind, shape, f"{row.parameters:,}", f"{row.macs / 1e6:,.1f}" if row.macs else "")
    Console(highlight=False).print(table)
