"""ONNX: the folded network from standard operators alone, checked in onnxruntime before the file is there.

Batch, height and width stay dynamic: the network is traced with a picture that no window divides, so that padding is
part of the graph (by nothing where the windows fit).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mambavision.inference.fuse import FusedMixer, fuse
from mambavision.inference.images import read_image, sample_pictures
from mambavision.inference.predictor import class_labels
from mambavision.inference.preprocess import build_transform
from mambavision.models.backbone import MambaVisionBackbone
from mambavision.models.classifier import MambaVision

OPSET = 18
TOLERANCE = 1e-4  # of the largest value of an output
# A protobuf holds 2 GiB; weights beyond lie in a second file beside it.
MAX_BYTES_INSIDE = 2**31 - 2**26
_TIMED_RUNS = 5


class ExportError(RuntimeError):
    """A network that cannot be exported; the message is one sentence with the reason."""


class DifferenceError(ExportError):
    """The file's outputs differ from PyTorch's, so it was not kept."""


@dataclass(frozen=True, kw_only=True)
class OnnxReport:
    """What was written and how it compares.

    Attributes:
        path: the file.
        size: its bytes, with those of the weights beside it.
        nodes: operations in the graph.
        error: largest difference to PyTorch on the sample photographs, relative to the largest value of its output.
        milliseconds: median of one photograph at the network's own size in onnxruntime, on the CPU.
    """

    path: Path
    size: int
    nodes: int
    error: float
    milliseconds: float


def export_onnx(model: MambaVisionBackbone, path: str | os.PathLike[str], *, uint8: bool = False) -> OnnxReport:
    """Write `model` as a float32 ONNX file, reload it in onnxruntime and compare it with PyTorch on photographs.

    The input is `pixel_values`, float32 (batch, in_chans, height, width), normalised; or with `uint8` `pixels`, uint8
    (batch, height, width, in_chans), as decoded. A classifier's output is `logits` (batch, num_classes); a backbone's
    are `stride_4`, `stride_8`, ... (batch, channels, H / stride, W / stride), sizes rounded up. Image size, mean, std,
    crop and class names are in the file's metadata, as JSON.

    Args:
        model: a classifier or a backbone; it is left as it is.
        path: file to write; missing folders are made. It appears only after everything has been checked.
        uint8: take pictures as bytes and normalise them in the graph.

    Returns:
        Size, nodes, largest error and time.

    Raises:
        ExportError: onnx, onnxscript or onnxruntime is not installed.
        DifferenceError: the reloaded file computes something else; nothing is left behind.
        ValueError: a network without weights, or for other than 1 or 3 channels.
    """
    onnx, onnxruntime = _packages()
    path = Path(path)
    fused = fuse(model).cpu().float()
    for module in fused.modules():
        if isinstance(module, FusedMixer):
            module.scan_backend = "chunked"  # standard operators on any machine
    graph: nn.Module = _Bytes(fused) if uint8 else fused
    outputs = ["logits"]
    if not isinstance(model, MambaVision):
        outputs = [f"stride_{reduction}" for reduction in model.feature_info.reduction()]
    proto = _trace(graph, _trace_input(fused, uint8=uint8), outputs)
    onnx.helper.set_model_props(proto, _metadata(model))

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        draft = Path(folder) / path.name
        weights = sum(parameter.numel() * 4 for parameter in fused.parameters())
        outside = weights > MAX_BYTES_INSIDE
        onnx.save_model(proto, draft, save_as_external_data=outside, location=f"{path.name}.data")
        del proto
        onnx.checker.check_model(draft, full_check=True)
        session = onnxruntime.InferenceSession(draft, providers=["CPUExecutionProvider"])
        error, milliseconds = _compare(model, session, uint8=uint8)
        if not error <= TOLERANCE:  # NaN included
            raise DifferenceError(
                f"{path} was not kept: onnxruntime's outputs differ from PyTorch's by {error:.1e} of the largest value."
            )
        del session
        nodes = len(onnx.load(draft, load_external_data=False).graph.node)
        files = sorted(Path(folder).iterdir(), key=lambda file: file == draft)  # the graph last
        size = sum(file.stat().st_size for file in files)
        for file in files:
            os.replace(file, path.with_name(file.name))
    return OnnxReport(path=path, size=size, nodes=nodes, error=error, milliseconds=milliseconds)


class _Bytes(nn.Module):
    """The network behind its normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: MambaVisionBackbone) -> None:
        super().__init__()
        self.network = network
        normalize = build_transform(network.config.preprocessing, network.config.in_chans).transforms[-1]
        for name, values in (("mean", normalize.mean), ("std", normalize.std)):
            self.register_buffer(name, 255 * torch.tensor(values).reshape(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Any:  # (batch, height, width, in_chans)
        return self.network((pixels.permute(0, 3, 1, 2).float() - self.mean) / self.std)


def _packages() -> tuple[Any, Any]:
    """The onnx and onnxruntime modules."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ModuleNotFoundError as error:
        raise ExportError(
            f"Export to ONNX needs {error.name}, which is not installed: pip install onnx onnxruntime onnxscript."
        ) from error
    return onnx, onnxruntime


def _trace_input(network: MambaVisionBackbone, *, uint8: bool) -> Tensor:
    """Pictures whose maps need padding wherever a picture's may: a size that no window of more than a token divides."""
    config = network.config
    rows = 2 + max(config.window_size[2:])
    while any(
        window > 1 and -(-rows * config.reductions[2] // config.reductions[level]) % window == 0
        for level, window in ((2, config.window_size[2]), (3, config.window_size[3]))
    ):
        rows += 1
    side = rows * config.reductions[2]
    shape = (2, side, side, config.in_chans) if uint8 else (2, config.in_chans, side, side)
    return torch.zeros(shape, dtype=torch.uint8 if uint8 else torch.float32)


def _trace(graph: nn.Module, example: Tensor, outputs: list[str]) -> Any:
    """The model as a protobuf with named dimensions and nothing of where it was made."""
    first = 1 if example.dtype == torch.uint8 else 2  # place of the height
    dynamic = torch.export.Dim.DYNAMIC
    name = "pixels" if example.dtype == torch.uint8 else "pixel_values"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        program = torch.onnx.export(
            graph.eval(),
            (example,),
            dynamo=True,
            dynamic_shapes=({0: dynamic, first: dynamic, first + 1: dynamic},),
            input_names=[name],
            output_names=outputs,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:  # paths and stack traces of the machine
        node.doc_string = ""
        del node.metadata_props[:]
    del proto.graph.value_info[:]  # its dimensions have the tracer's names
    del proto.graph.metadata_props[:]
    dimensions = proto.graph.input[0].type.tensor_type.shape.dim
    for place, label in ((0, "batch"), (first, "height"), (first + 1, "width")):
        dimensions[place].dim_param = label
    for value in proto.graph.output:
        for place, dimension in enumerate(value.type.tensor_type.shape.dim):
            if dimension.dim_param:
                dimension.dim_param = ("batch", "", f"{value.name}_height", f"{value.name}_width")[place]
    return proto


def _metadata(model: MambaVisionBackbone) -> dict[str, str]:
    """What a caller needs to prepare pictures and name classes; each value is JSON."""
    preprocessing = model.config.preprocessing
    normalize = build_transform(preprocessing, model.config.in_chans).transforms[-1]
    values: dict[str, Any] = {
        "image_size": list(preprocessing.img_size),
        "crop_pct": preprocessing.crop_pct,
        "crop_mode": preprocessing.crop_mode,
        "interpolation": preprocessing.interpolation,
        "mean": list(normalize.mean),
        "std": list(normalize.std),
    }
    if isinstance(model, MambaVision) and model.config.num_classes:
        values["class_names"] = list(class_labels(model.config))
    return {name: json.dumps(value) for name, value in values.items()}


def _compare(model: MambaVisionBackbone, session: Any, *, uint8: bool) -> tuple[float, float]:
    """(largest relative error over the photographs, at their own size in one batch and one alone at another, ms)."""
    transform = build_transform(model.config.preprocessing, model.config.in_chans)
    images = [read_image(picture) for picture in sample_pictures()]
    normalised = torch.stack([transform(image) for image in images])
    pixels = normalised
    if uint8:
        mean, std = (
            torch.tensor(values).reshape(-1, 1, 1)
            for values in (transform.transforms[-1].mean, transform.transforms[-1].std)
        )
        pixels = ((normalised * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    height, width = normalised.shape[-2:]
    odd = (slice(0, height - height // 5), slice(0, width - width // 3))
    place = (slice(0, 1), *odd) if uint8 else (slice(0, 1), slice(None), *odd)
    pairs = [(normalised, pixels), (normalised[:1, :, odd[0], odd[1]], pixels[place])]
    name = session.get_inputs()[0].name
    weight = next(model.parameters())
    error = 0.0
    was_training = model.training
    model.eval()
    try:
        for inputs, fed in pairs:
            with torch.inference_mode():
                expected = model(inputs.to(weight))
            maps = [expected] if isinstance(expected, Tensor) else expected
            found = session.run(None, {name: np.ascontiguousarray(fed.numpy())})
            for ours, theirs in zip(maps, found, strict=True):
                reference = ours.float().cpu().numpy()
                error = float(np.maximum(error, np.abs(theirs - reference).max() / np.abs(reference).max()))
    finally:
        model.train(was_training)
    one = {name: np.ascontiguousarray(pixels[:1].numpy())}
    times = []
    for _ in range(_TIMED_RUNS):
        started = time.perf_counter()
        session.run(None, one)
        times.append(time.perf_counter() - started)
    return error, 1e3 * float(np.median(times))
