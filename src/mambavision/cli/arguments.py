"""What the commands share: arguments, their types, the error for those that fit none, and where messages go."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from mambavision.inference.predictor import Predictor


TYPES = ("float32", "bfloat16", "float16")


class UsageError(Exception):
    """Arguments that do not go together; the message is one sentence."""


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    if value >= 2**63:  # what a tensor's size can be
        raise argparse.ArgumentTypeError(f"must be less than 2^63, got {value}")
    return value


def image_size(text: str) -> tuple[int, int]:
    """`224`, or `256x192` for height x width, in pixels."""
    sides = [positive(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"must be one number or HEIGHTxWIDTH, got {text!r}")
    return sides[0], sides[-1]


def add_overwrite(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --overwrite, for a command whose output is `what`."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what} that is there")


def check_free(path: Path, *, overwrite: bool, option: str = "--output") -> None:
    """UsageError when a file to write, which `option` names, is there already and --overwrite was not given."""
    from mambavision.inference.images import printable

    if path.exists() and not overwrite:
        raise UsageError(f"{printable(str(path))} exists; --overwrite replaces it, {option} names another.")


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add --model and --checkpoint: which network with which weights."""
    parser.add_argument(
        "--model", metavar="NAME", help="a variant of `mambavision models`; its published weights are fetched"
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="your own weights, or a public file together with --model")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", default="auto", help="auto (default: CUDA, else MPS, else CPU), cpu, cuda:1, ...")


def add_batch_size(parser: argparse.ArgumentParser, default: int) -> None:
    """Add --batch-size."""
    parser.add_argument(
        "--batch-size", type=positive, default=default, metavar="N", help=f"pictures at once (default: {default})"
    )


def open_predictor(options: argparse.Namespace) -> Predictor:
    """The predictor that --model, --checkpoint, --device and --batch-size describe; UsageError when there is none."""
    from mambavision.inference.predictor import Predictor

    try:
        return Predictor(
            options.model, checkpoint=options.checkpoint, device=options.device, batch_size=options.batch_size
        )
    except ValueError as error:  # what was asked for cannot be
        raise UsageError(str(error)) from error


def message_console() -> Console:
    """Where messages and progress go: standard error, their text as it is."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


# What argparse calls them where `int` refuses the text.
positive.__name__ = "integer"
image_size.__name__ = "size"
