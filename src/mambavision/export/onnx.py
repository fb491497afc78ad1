"""ONNX: the folded network from standard operators alone, checked in onnxruntime before the file is there.

Batch, height and width stay dynamic: the network is traced with a picture that no window divides, so that padding is
part of the graph (by nothing where the windows fit).
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambavision.export.check import ExportError, Report, Run, check_model, packages, write_checked
from mambavision.export.formats import as_path, check_request
from mambavision.export.graph import (
    Graph,
    dynamic_dimensions,
    input_name,
    metadata,
    output_names,
    trace_module,
    trace_program,
)
from mambavision.export.pictures import Calibration, calibration_batches, describe_calibration
from mambavision.export.resize import ResizeAndCrop
from mambavision.models.backbone import MambaVisionBackbone

OPSET = 18
OLDEST_TORCH = "2.7"  # exporters before cannot decompose a linear layer behind a split of unknown size
# A protobuf holds 2 GiB; weights beyond lie in a second file beside it.
MAX_BYTES_INSIDE = 2**31 - 2**26
# What is quantised: the operations with weights and the products of attention. The scan stays float32.
QUANTIZED_OPERATORS = ["Conv", "Gemm", "MatMul"]
# Where a file is opened, by what onnxruntime calls it. TensorFloat-32 is off there, so that a difference to PyTorch is
# the file's.
PROVIDERS: dict[str, Any] = {
    "cpu": "CPUExecutionProvider",
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
}
_RESIZED = "resized"  # pictures between resizing and the network


def export_onnx(
    model: MambaVisionBackbone,
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    uint8: bool = False,
    resize: bool = False,
    calibration: Calibration | None = None,
    device: str = "cpu",
) -> Report:
    """Write `model` as an ONNX file, reload it in onnxruntime and compare it with PyTorch on photographs.

    The input is `pixel_values`, float32 (batch, in_chans, height, width), normalised; or with `uint8` `pixels`, uint8
    (batch, height, width, in_chans), as decoded. A classifier's output is `logits` (batch, num_classes), or without a
    head `features` (batch, channels); a backbone's are `stride_4`, `stride_8`, ... (batch, channels, H / stride,
    W / stride), sizes rounded up; all are float32. Image size, mean, std, crop and class names are in the file's
    metadata, as JSON.

    Args:
        model: a classifier or a backbone; it is left as it is.
        path: file to write, ending in .onnx; missing folders are made. It appears only after everything has been
            checked.
        dtype: `float32`; `float16`, weights and all but the scan; or `int8`, weights, inputs of convolutions and
            matrix products, as QuantizeLinear and DequantizeLinear, the rest in float32.
        uint8: take pictures as bytes and normalise them in the graph.
        resize: take pictures as bytes in any size, and resize and crop them in the graph, too.
        calibration: a folder of pictures, or pictures, on which int8 finds the ranges of activations; None takes the
            sample photographs.
        device: where the file is reloaded, compared and timed, `cpu` or `cuda`; it is the same file for both.

    Returns:
        Size, nodes, largest error and time.

    Raises:
        ExportError: onnx, onnxscript or onnxruntime is not installed or has no CUDA, or PyTorch is too old.
        DifferenceError: the reloaded file computes something else; nothing is left behind.
        TypeError: `model` is no network of this package.
        ValueError: no such type or device, another suffix, an optimised network, weights in half precision, other than
            1 or 3 channels, or no pictures.
    """
    check_request("onnx", dtype, calibration)
    check_model(model)
    path = Path(as_path(path, "onnx"))
    with packages("Export to ONNX", "onnx onnxruntime onnxscript"):
        import onnx
        import onnxruntime  # noqa: F401  (`open_file` needs it)
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    check_provider(device)

    uint8 = uint8 or resize
    graph = Graph(model, uint8=uint8, dtype=torch.float16 if dtype == "float16" else torch.float32)
    batches = calibration_batches(model, calibration, uint8=uint8) if dtype == "int8" else []

    def write(draft: Path) -> int:
        proto = trace_onnx(model, graph)
        if dtype == "int8":
            proto = quantize_onnx(proto, graph, batches)
        if resize:
            put_before(proto, trace_resize(model))
        onnx.helper.set_model_props(proto, metadata(model))
        save_onnx(proto, draft, graph)
        onnx.checker.check_model(draft, full_check=True)
        return len(proto.graph.node)

    return write_checked(
        model,
        path,
        runtime="onnxruntime" if device == "cpu" else f"onnxruntime on {device}",
        dtype=dtype,
        uint8=uint8,
        decoded=resize,
        write=write,
        load=partial(open_file, device=device),
        calibration=describe_calibration(calibration, batches) if batches else None,
    )


def check_provider(device: str) -> None:
    """Refuse a device that this onnxruntime cannot use.

    Raises:
        ValueError: no such device.
        ExportError: onnxruntime was built without it.
    """
    import onnxruntime

    if device not in PROVIDERS:
        raise ValueError(f"onnxruntime opens files here on {' or '.join(PROVIDERS)}, not on {device!r}.")
    if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise ExportError(
            "This onnxruntime was built without CUDA: pip uninstall onnxruntime, then pip install onnxruntime-gpu."
        )


def open_file(path: Path, device: str = "cpu") -> Run:
    """The file in onnxruntime, on a CPU on as many threads as PyTorch uses.

    Raises:
        ExportError: onnxruntime cannot use the device.
        ValueError: no such device.
    """
    import onnxruntime

    check_provider(device)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=[PROVIDERS[device]])
    if device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise ExportError("onnxruntime could not start on the GPU; what it misses is in its own message before this.")
    name = session.get_inputs()[0].name
    return lambda pictures: [torch.from_numpy(found) for found in session.run(None, {name: pictures.numpy()})]


def trace_onnx(model: MambaVisionBackbone, graph: Graph) -> Any:
    """The graph of `model` as a protobuf with named dimensions and nothing of where it was made.

    Raises:
        ExportError: PyTorch is too old.
    """
    if not torch.__version__ >= OLDEST_TORCH:  # PyTorch's own comparison of versions
        raise ExportError(
            f"Export to ONNX needs PyTorch {OLDEST_TORCH} or newer, and this is {torch.__version__}: "
            f"pip install --upgrade torch torchvision."
        )
    name = input_name(uint8=graph.uint8)
    proto = translate(trace_program(graph), name, output_names(model))
    _name_dimensions(proto, height=1 if graph.uint8 else 2)
    return proto


def trace_resize(model: MambaVisionBackbone) -> Any:
    """`ResizeAndCrop` for the model as a protobuf."""
    pictures = torch.zeros(2, 70, 90, model.config.in_chans, dtype=torch.uint8)
    module = ResizeAndCrop(model.config.preprocessing).eval()
    program = trace_module(module, pictures, dynamic_dimensions(uint8=True))
    proto = translate(program, input_name(uint8=True), [_RESIZED])
    _name_dimensions(proto, height=1)
    return proto


def put_before(proto: Any, first: Any) -> None:
    """Make the output of the graph `first` the input of `proto`, whose input has the name and place of `first`'s."""
    from onnx import compose

    taken = proto.graph.input[0].name
    for node in proto.graph.node:
        node.input[:] = [_RESIZED if name == taken else name for name in node.input]
    first = compose.add_prefix(first, "resize/", rename_inputs=False, rename_outputs=False)
    nodes = [*first.graph.node, *map(copy.deepcopy, proto.graph.node)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(first.graph.initializer)
    proto.graph.input[0].CopyFrom(first.graph.input[0])


def translate(traced: torch.export.ExportedProgram, name: str, outputs: list[str]) -> Any:
    """The program as a protobuf with nothing of where it was made, its input called `name`.

    It comes traced: some PyTorch trace for ONNX in a way that knows no slices of maps.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        program = torch.onnx.export(
            traced,
            dynamo=True,
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
    return proto


def _name_dimensions(proto: Any, *, height: int) -> None:
    dimensions = proto.graph.input[0].type.tensor_type.shape.dim
    for place, label in ((0, "batch"), (height, "height"), (height + 1, "width")):
        dimensions[place].dim_param = label
    for value in proto.graph.output:
        for place, dimension in enumerate(value.type.tensor_type.shape.dim):
            if dimension.dim_param:
                dimension.dim_param = ("batch", "", f"{value.name}_height", f"{value.name}_width")[place]


def save_onnx(proto: Any, path: Path, graph: Graph) -> None:
    """Write the protobuf of `graph`, large weights into `NAME.data` beside it."""
    import onnx

    onnx.save_model(proto, path, save_as_external_data=_is_large(graph), location=f"{path.name}.data")


def _is_large(graph: Graph) -> bool:
    return sum(parameter.nbytes for parameter in graph.parameters()) > MAX_BYTES_INSIDE


def quantize_onnx(proto: Any, graph: Graph, batches: list[Tensor]) -> Any:
    """The protobuf of `graph` with 8-bit weights and activations, calibrated by onnxruntime on `batches` of inputs."""
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.remaining = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.remaining, None)
            return None if batch is None else {proto.graph.input[0].name: batch.numpy()}

    with tempfile.TemporaryDirectory() as folder, _without_advice():
        source, target = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        save_onnx(proto, source, graph)
        quantization.quantize_static(
            source,
            target,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=QUANTIZED_OPERATORS,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            reduce_range=True,  # processors without VNNI add pairs of products in 16 bits
            use_external_data_format=_is_large(graph),
        )
        return onnx.load(target)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without onnxruntime's warnings that its optimiser was not run: that would put operators of its own in."""
    root = logging.getLogger()

    def other(record: logging.LogRecord) -> bool:
        return "pre-processing" not in record.getMessage()

    root.addFilter(other)
    try:
        yield
    finally:
        root.removeFilter(other)
