"""What the commands share: types of arguments, and the error for those that fit no type."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mambavision.inference.predictor import Predictor


TYPES = ("float32", "bfloat16", "float16")


class UsageError(Exception):
    """Arguments that do not go together; the message is one sentence."""


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def image_size(text: str) -> tuple[int, int]:
    """`224`, or `256x192` for height x width, in pixels."""
    sides = [positive(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"must be one number or HEIGHTxWIDTH, got {text!r}")
    return sides[0], sides[-1]


def open_predictor(options: argparse.Namespace) -> Predictor:
    """The predictor that --model, --checkpoint, --device and --batch-size describe; UsageError when there is none."""
    from mambavision.inference.predictor import Predictor

    try:
        return Predictor(
            options.model, checkpoint=options.checkpoint, device=options.device, batch_size=options.batch_size
        )
    except ValueError as error:  # what was asked for cannot be
        raise UsageError(str(error)) from error


# What argparse calls them where `int` refuses the text.
positive.__name__ = "integer"
image_size.__name__ = "size"
