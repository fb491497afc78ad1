"""OpenVINO: the ONNX graph as OpenVINO's own two files, NAME.xml and NAME.bin, checked on its CPU plugin."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from mambavision.export.check import Report, Run, check_model, packages, write_checked
from mambavision.export.formats import as_path, check_request
from mambavision.export.graph import Graph, metadata
from mambavision.export.onnx import quantize_onnx, save_onnx, trace_onnx
from mambavision.export.pictures import Calibration, calibration_batches, describe_calibration
from mambavision.models.backbone import MambaVisionBackbone

INSTALL = "openvino onnx onnxruntime onnxscript"
# Where the metadata lie in the file: get_rt_info(["model_info", NAME]).
METADATA = "model_info"
# On processors that have bfloat16 OpenVINO computes in it unless told otherwise.
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}


def export_openvino(
    model: MambaVisionBackbone,
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    uint8: bool = False,
    calibration: Calibration | None = None,
) -> Report:
    """Write `model` as OpenVINO's files, reload them and compare them with PyTorch on photographs, on the CPU.

    Input and outputs are those of `export_onnx`; batch, height and width are dynamic. The weights lie in
    NAME.bin beside the graph.

    Args:
        model: a classifier or a backbone; it is left as it is.
        path: file to write, ending in .xml; it appears only after it has been compared.
        dtype: `float32`; `float16`, in which the weights are stored, while the device decides what it computes in; or
            `int8`, weights and inputs of convolutions and matrix products, the rest in float32.
        uint8: take pictures as bytes and normalise them inside.
        calibration: as for `export_onnx`.

    Raises:
        ExportError: openvino, onnx, onnxscript or, for int8, onnxruntime is not installed.
        DifferenceError: the reloaded file computes something else; nothing is left behind.
        ValueError: no such type, another suffix, a network without weights, for other than 1 or 3 channels, or no
            pictures.
    """
    check_request("openvino", dtype, calibration)
    check_model(model)
    path = Path(as_path(path, "openvino"))
    with packages("Export to OpenVINO", INSTALL):
        import onnx  # noqa: F401  (the graph comes from there)
        import onnxscript  # noqa: F401
        import openvino

    batches = calibration_batches(model, calibration, uint8=uint8) if dtype == "int8" else []

    def write(draft: Path) -> int:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "graph.onnx"
            graph = Graph(model, uint8=uint8)
            proto = trace_onnx(model, graph)
            save_onnx(quantize_onnx(proto, graph, batches) if batches else proto, source, graph)
            converted = openvino.convert_model(source)
            for name, value in metadata(model).items():
                converted.set_rt_info(value, [METADATA, name])
            openvino.save_model(converted, draft, compress_to_fp16=dtype == "float16")
            return len(converted.get_ops())

    return write_checked(
        model,
        path,
        runtime="OpenVINO",
        dtype=dtype,
        uint8=uint8,
        write=write,
        load=open_file,
        calibration=describe_calibration(calibration, batches) if batches else None,
    )


def open_file(path: Path) -> Run:
    """The file on the CPU."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", SETTINGS)

    def run(pictures: Tensor) -> list[Tensor]:
        return [torch.from_numpy(value.copy()) for value in compiled([pictures.numpy()]).values()]

    return run
