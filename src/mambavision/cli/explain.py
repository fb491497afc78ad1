"""`mambavision explain`: where a network looked, as a picture beside the picture's class."""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from mambavision.cli.arguments import (
    UsageError,
    add_device,
    add_network,
    add_overwrite,
    check_free,
    image_size,
    open_predictor,
)

SUMMARY = "Show where a model looked: class activation and attention over a picture."
SUFFIX = ".explained.png"


def point(text: str) -> tuple[float, float]:
    """`0.5,0.25`: x and y as shares of the picture's width and height."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be X,Y, two numbers in 0..1, got {text!r}") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f"must lie in 0..1 both ways, got {text!r}")
    return x, y


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="mambavision explain",
        description="Draw the class-activation map and the attention of both window levels over pictures, as PNG.",
        epilog="Exit code 1: some pictures could not be read. 2: wrong use, or some overlays were there already; the "
        "rest is done.",
    )
    parser.add_argument("paths", nargs="*", metavar="IMAGE", help="a picture, a folder or a quoted glob")
    parser.add_argument("--samples", action="store_true", help="the photographs that ship with the package")
    parser.add_argument(
        "--class", dest="target", metavar="NAME", help="the class to explain, by name or index (default: the likeliest)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PATH",
        help=f"a .png file for one picture, or a folder (default: NAME{SUFFIX} in the current folder)",
    )
    add_overwrite(parser, "an overlay")
    parser.add_argument("--per-block", action="store_true", help="the attention of each block instead of their mean")
    parser.add_argument(
        "--from", dest="point", type=point, metavar="X,Y", help="attention paid by the token there, both in 0..1"
    )
    parser.add_argument(
        "--img-size", type=image_size, metavar="SIZE", help="picture side, or HEIGHTxWIDTH (default: the model's own)"
    )
    add_network(parser)
    add_device(parser)
    parser.set_defaults(batch_size=1)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 when a picture or a path failed, 2 when nothing was given or an overlay was there."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if not options.paths and not options.samples:
        parser.error("no pictures given: name files, folders or globs, or use --samples")

    from mambavision.inference.images import printable
    from mambavision.inference.picture_files import find_pictures, sample_pictures

    found, problems = find_pictures(options.paths)
    pictures = [*(sample_pictures() if options.samples else []), *found]
    for problem in problems:
        print(problem, file=sys.stderr)
    targets = _targets(pictures, options.output)
    if not pictures:
        return 1

    from mambavision.inference.explain import explain, find_class, preprocessing_of_size
    from mambavision.inference.overlay import overlay, save_overlay

    predictor = open_predictor(options)
    try:
        preprocessing_of_size(predictor.config.preprocessing, options.img_size)  # once, not for every picture
        target = None if options.target is None else find_class(options.target, predictor.labels)
    except ValueError as error:
        raise UsageError(str(error)) from error
    code = 1 if problems else 0
    for picture, path in zip(pictures, targets, strict=True):
        try:
            check_free(path, overwrite=options.overwrite)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters becomes an error
                explanation = explain(predictor, picture, target=target, img_size=options.img_size)
        except UsageError as error:
            print(error, file=sys.stderr)
            code = 2
            continue
        except ValueError as error:  # a picture that cannot be read, too
            print(error, file=sys.stderr)
            code = max(code, 1)
            continue
        save_overlay(overlay(explanation, per_block=options.per_block, point=options.point), path)
        print(f"{printable(str(picture))}: {explanation.label} {explanation.probability:.1%}, {printable(str(path))}")
    return code


def _targets(pictures: list[Path], output: Path | None) -> list[Path]:
    """A file to write for each picture; pictures of one name get numbers."""
    if output is not None and output.suffix.lower() == ".png" and not output.is_dir():
        if len(pictures) > 1:
            raise UsageError(f"--output must be a folder for {len(pictures)} pictures, got {output}.")
        return [output for _ in pictures]
    if output is not None and (output.suffix or output.is_file()) and not output.is_dir():
        raise UsageError(f"--output must be a .png file or a folder, got {output}.")
    folder = output or Path()
    targets: dict[Path, None] = {}  # in order
    for picture in pictures:
        numbers = (f"-{number}" if number > 1 else "" for number in itertools.count(1))
        names = (folder / f"{picture.stem}{number}{SUFFIX}" for number in numbers)
        targets[next(name for name in names if name not in targets)] = None
    return list(targets)


# What argparse calls it where it refuses the text.
point.__name__ = "point"
