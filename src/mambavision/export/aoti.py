"""AOTInductor: the folded network compiled to machine code, in a `.pt2` that PyTorch (or its C++ library) runs.

The file is for the device that the model is on: a CPU with this processor's instructions, or a CUDA GPU of this kind,
where the scan is our Triton kernels, compiled into the file.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor

from mambavision.export.check import ExportError, Report, Run, check_model, write_checked
from mambavision.export.formats import as_path, check_request
from mambavision.export.graph import Graph, metadata, trace_program
from mambavision.models.backbone import MambaVisionBackbone
from mambavision.ops.selective_scan import choose_backend


def export_aoti(
    model: MambaVisionBackbone, path: str | os.PathLike[str], *, dtype: str = "float32", uint8: bool = False
) -> Report:
    """Compile `model` for the device it is on, reload the file and compare it with PyTorch on photographs.

    Input and outputs are those of `export_onnx`; batch, height and width are dynamic. Compiling takes minutes.

    Args:
        model: a classifier or a backbone; it is left as it is.
        path: file to write, ending in .pt2; it appears only after it has been compared.
        dtype: `float32`, or `float16` for weights and all but the scan.
        uint8: take pictures as bytes and normalise them inside.

    Raises:
        ExportError: there is no C++ compiler.
        DifferenceError: the compiled network computes something else; nothing is left behind.
        ValueError: no such type, another suffix, a network without weights, or for other than 1 or 3 channels.
    """
    check_request("aoti", dtype)
    check_model(model)
    path = Path(as_path(path, "aoti"))
    named = os.environ.get("CXX")  # if it is set, no other is taken
    if named is not None and shutil.which(named) is None:
        raise ExportError(f"Export to AOTInductor needs a C++ compiler, and there is no {named}, which CXX names.")
    if named is None and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        raise ExportError(
            "Export to AOTInductor needs a C++ compiler, and none is installed; on Debian: apt install g++."
        )
    device = next(model.parameters()).device
    kind = getattr(torch, dtype)
    graph = Graph(model, uint8=uint8, dtype=kind, device=device, scan_backend=_scan_backend(model, device, kind))

    def write(draft: Path) -> int:
        program = trace_program(graph)
        settings = {"aot_inductor.metadata": metadata(model)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the compiler
            torch._inductor.aoti_compile_and_package(program, package_path=str(draft), inductor_configs=settings)
        return sum(node.op == "call_function" for node in program.graph.nodes)

    return write_checked(model, path, runtime="AOTInductor", dtype=dtype, uint8=uint8, write=write, load=open_file)


def open_file(path: Path) -> Run:
    """The compiled network, on the device that it was compiled for."""
    compiled = torch._inductor.aoti_load_package(str(path))
    device = compiled.get_metadata()["AOTI_DEVICE_KEY"]

    @torch.inference_mode()
    def run(pictures: Tensor) -> list[Tensor]:
        found = compiled(pictures.to(device).contiguous())  # as it was traced
        return [value.cpu() for value in ([found] if isinstance(found, Tensor) else found)]

    return run


def _scan_backend(model: MambaVisionBackbone, device: torch.device, dtype: torch.dtype) -> str:
    """Our kernels where they run, else standard operations."""
    if device.type != "cuda":
        return "chunked"
    sequence = torch.empty(1, 1, 1, device=device, dtype=dtype)
    try:
        return choose_backend(sequence, "triton", state=model.config.d_state).backend.name
    except RuntimeError:  # no kernels for this state, or no Triton
        return "chunked"
