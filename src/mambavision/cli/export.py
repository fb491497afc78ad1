"""`mambavision export`: a network as a file for another runtime, compared with PyTorch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mambavision.cli.arguments import UsageError, add_overwrite, check_free, image_size, message_console, positive

SUMMARY = "Write a network as a file of another runtime and compare it with PyTorch."


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    from mambavision.export.formats import DTYPES, FORMATS

    parser = argparse.ArgumentParser(
        prog="mambavision export",
        description="Write a network for another runtime, reload it there and compare it on the sample photographs.",
        epilog="Batch, height and width are dynamic, except with executorch. "
        "Exit code 1: the outputs differed and no file was written. 2: wrong use, or the file was there already.",
    )
    parser.add_argument("model", metavar="MODEL", help="a name that `mambavision models` lists; its published weights")
    parser.add_argument("--format", choices=tuple(FORMATS), default="onnx", help="default: onnx")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="default: float32; which formats have which: docs/formats.md"
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="weights of your own")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write (default: the model's or checkpoint's name, what was asked for and the format's suffix, "
        "like MODEL.features.int8.onnx)",
    )
    add_overwrite(parser, "a file")
    parser.add_argument("--features", action="store_true", help="the four feature maps instead of the classes")
    parser.add_argument("--uint8", action="store_true", help="take pictures as bytes and normalise them inside")
    parser.add_argument("--resize", action="store_true", help="onnx: take pictures of any size and resize them inside")
    parser.add_argument(
        "--img-size",
        type=image_size,
        metavar="SIZE",
        help="picture size that its windows fit without padding (default: the model's own)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="pictures to calibrate int8 on, in any subfolders; 256 are taken (default: the sample photographs)",
    )
    parser.add_argument("--batch-size", type=positive, metavar="N", help="executorch: pictures a call (default: 1)")
    parser.add_argument(
        "--device", help="aoti: what the file is compiled for, cpu (default), cuda, ...; onnx: where it is compared"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 when the file would have differed."""
    options = build_parser().parse_args(argv)
    from mambavision.export.formats import FORMATS, check_request

    chosen = FORMATS[options.format]
    output = options.output or _default_output(options)
    if output.is_dir():
        raise UsageError(f"--output must be a file, and {output} is a folder.")
    if options.device is not None and options.format != "aoti" and "device" not in chosen.settings:
        raise UsageError(f"--device works only with aoti and onnx, and {options.format} was asked for.")
    # A compiled file is for the network's device. Another is compared on its own, with the network on the CPU.
    settings = {}
    network_device = options.device if options.format == "aoti" else None
    if options.device is not None and network_device is None:
        settings["device"] = options.device
    for name in ("calibration", "batch_size", "resize"):
        value = getattr(options, name) or None
        if value is not None and name not in chosen.settings:
            others = " and ".join(other for other, row in FORMATS.items() if name in row.settings)
            raise UsageError(f"--{name.replace('_', '-')} works only with {others}, not with {options.format}.")
        if value is not None:
            settings[name] = value
    try:
        check_request(options.format, options.dtype, options.calibration)
    except ValueError as error:
        raise UsageError(str(error)) from error
    check_free(output, overwrite=options.overwrite)

    from rich.text import Text

    from mambavision.export.check import DifferenceError
    from mambavision.factory import create_model
    from mambavision.inference.predictor import find_device

    try:
        model = create_model(
            options.model,
            pretrained=options.checkpoint is None,
            checkpoint_path=options.checkpoint,
            features_only=options.features,
            img_size=options.img_size,
            device=find_device(network_device or "cpu"),
        )
        waiting = Text(
            f"writing {output} and comparing it; large networks take minutes"
        )  # brackets in names as they are
        with message_console().status(waiting):
            report = chosen.export(model, output, dtype=options.dtype, uint8=options.uint8, **settings)
    except DifferenceError as error:
        print(f"mambavision: {error}", file=sys.stderr)
        return 1
    except ValueError as error:  # what was asked for cannot be
        raise UsageError(str(error)) from error
    print(f"{report.path}: {report.size / 2**20:.1f} MiB, {report.nodes} nodes")
    if report.calibration is not None:
        print(f"calibrated on {report.calibration}")
    agreement = "" if report.agreement is None else f", the same class for {report.agreement:.0%} of the photographs"
    print(f"largest error {report.error:.1e} of the largest value{agreement}")
    print(f"{report.milliseconds:.1f} ms a call ({report.runtime})")
    return 0


def _default_output(options: argparse.Namespace) -> Path:
    """A file in the current folder whose name says what was asked for."""
    from mambavision.export.formats import default_name

    name = options.model
    if options.checkpoint is not None:  # best.pth.tar and best.safetensors are both `best`; a folder goes by its name
        name = Path(Path(options.checkpoint).resolve().name.removesuffix(".tar")).stem
    return Path(
        default_name(
            name,
            options.format,
            options.dtype,
            features=options.features,
            uint8=options.uint8,
            resize=options.resize,
            img_size=options.img_size,
            batch_size=options.batch_size,
        )
    )
