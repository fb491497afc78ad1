"""`mambavision export`: a network as a file for another runtime, compared with PyTorch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mambavision.cli.arguments import UsageError, image_size

SUMMARY = "Write a network as an ONNX file and compare it with PyTorch."


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="mambavision export",
        description="Write a network in float32 for onnxruntime and others, and compare it on the sample photographs.",
        epilog="Batch, height and width are dynamic. Exit code 1: the outputs differed and no file was written.",
    )
    parser.add_argument("model", metavar="MODEL", help="a name that `mambavision models` lists; its published weights")
    parser.add_argument("--format", choices=("onnx",), default="onnx", help="default: onnx")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights of your own")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: MODEL.onnx)")
    parser.add_argument("--features", action="store_true", help="the four feature maps instead of the classes")
    parser.add_argument("--uint8", action="store_true", help="take pictures as bytes and normalise them inside")
    parser.add_argument(
        "--img-size", type=image_size, metavar="SIZE", help="size that windows cover (default: the model's own)"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 when the file would have differed."""
    options = build_parser().parse_args(argv)
    output = options.output or Path(f"{options.model}.onnx")
    if output.is_dir():
        raise UsageError(f"--output must be a file, and {output} is a folder.")

    from mambavision.export.onnx import DifferenceError, export_onnx
    from mambavision.factory import create_model

    try:
        model = create_model(
            options.model,
            pretrained=options.checkpoint is None,
            checkpoint_path=options.checkpoint,
            features_only=options.features,
            img_size=options.img_size,
        )
        report = export_onnx(model, output, uint8=options.uint8)
    except DifferenceError as error:
        print(f"mambavision: {error}", file=sys.stderr)
        return 1
    except ValueError as error:  # what was asked for cannot be
        raise UsageError(str(error)) from error
    print(f"{report.path}: {report.size / 2**20:.1f} MiB, {report.nodes} nodes")
    print(
        f"largest error {report.error:.1e} of the largest value, {report.milliseconds:.1f} ms a picture (onnxruntime)"
    )
    return 0
