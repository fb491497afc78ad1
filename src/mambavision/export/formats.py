"""The formats by name: what writes each, in which types, and which settings are its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

DTYPES = ("float32", "float16", "int8")


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format.

    Attributes:
        module: of this package, imported when the format is asked for.
        function: in it, which writes, reloads and compares: (model, path, *, dtype, uint8, ...) -> Report.
        suffix: of its files.
        dtypes: types of `DTYPES` that it has.
        settings: keywords of `function` that other formats lack.

    `open_file` of the module opens a file: pictures in, outputs as float32 on the CPU.
    """

    module: str
    function: str
    suffix: str
    dtypes: tuple[str, ...]
    settings: tuple[str, ...] = ()

    @property
    def export(self) -> Callable[..., Any]:
        """The function that writes, reloads and compares."""
        return self._member(self.function)

    @property
    def open_file(self) -> Callable[[Path], Any]:
        """The function that opens a file."""
        return self._member("open_file")

    def _member(self, name: str) -> Callable[..., Any]:
        member: Callable[..., Any] = getattr(import_module(f"mambavision.export.{self.module}"), name)
        return member


FORMATS: dict[str, Format] = {
    "onnx": Format(
        module="onnx",
        function="export_onnx",
        suffix=".onnx",
        dtypes=DTYPES,
        settings=("calibration", "resize", "device"),
    ),
    "torch-export": Format(
        module="torch_export", function="export_torch", suffix=".pt2", dtypes=("float32", "float16")
    ),
    "aoti": Format(module="aoti", function="export_aoti", suffix=".aoti.pt2", dtypes=("float32", "float16")),
    "openvino": Format(
        module="openvino", function="export_openvino", suffix=".xml", dtypes=DTYPES, settings=("calibration",)
    ),
    "executorch": Format(
        module="executorch",
        function="export_executorch",
        suffix=".pte",
        dtypes=("float32", "int8"),
        settings=("batch_size", "calibration"),
    ),
}


def check_request(name: str, dtype: str, calibration: object = None) -> None:
    """Refuse a type that format `name` does not have, and pictures to calibrate what is not int8.

    Raises:
        ValueError: with the types there are, or with what the pictures would be for.
    """
    dtypes = FORMATS[name].dtypes
    if dtype not in dtypes:
        others = [other for other, row in FORMATS.items() if dtype in row.dtypes]
        hint = f"; choose {' or '.join(others)} for {dtype}" if others else ""
        raise ValueError(f"{name} files are written in {' or '.join(dtypes)}, not in {dtype!r}{hint}.")
    if calibration is not None and dtype != "int8":
        raise ValueError(f"Pictures for calibration are for int8 alone, and {dtype} was asked for.")


def default_name(
    model: str,
    name: str,
    dtype: str,
    *,
    features: bool = False,
    uint8: bool = False,
    resize: bool = False,
    img_size: tuple[int, int] | None = None,
    batch_size: int | None = None,
) -> str:
    """File for a model in a format, with what was asked for: `mamba_vision_T.features.384x640.int8.onnx`.

    Args:
        model: the network's name, or its checkpoint's.
        name: of the format.
        dtype: left out when it is float32.
        features: whether it gives feature maps.
        uint8: whether it takes bytes; left out with `resize`, which always does.
        resize: whether it resizes.
        img_size: height and width, where other than the network's own were asked for.
        batch_size: where one was asked for.
    """
    parts = [model]
    if features:
        parts.append("features")
    if resize or uint8:
        parts.append("resize" if resize else "uint8")
    if img_size is not None:
        height, width = img_size
        parts.append(f"{height}" if height == width else f"{height}x{width}")
    if batch_size is not None:
        parts.append(f"batch{batch_size}")
    if dtype != "float32":
        parts.append(dtype)
    return ".".join(parts) + FORMATS[name].suffix


def as_path(path: str | os.PathLike[str], name: str) -> str:
    """`path` as text; ValueError where a runtime would not know a file without its suffix."""
    text, suffix = os.fspath(path), "." + FORMATS[name].suffix.rpartition(".")[2]
    if not text.endswith(suffix):
        raise ValueError(f"The file for {name} must end in {suffix}, got {text}.")
    return text
