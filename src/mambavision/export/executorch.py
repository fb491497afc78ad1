"""ExecuTorch: the folded network as a `.pte` for phones and boards, run by XNNPACK, for one batch and picture size."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambavision.export.check import Report, Run, check_model, packages, write_checked
from mambavision.export.formats import as_path, check_request
from mambavision.export.graph import Graph, blank_input, metadata
from mambavision.export.pictures import Calibration, calibration_batches, describe_calibration
from mambavision.models.backbone import MambaVisionBackbone

INSTALL = "executorch"


def export_executorch(
    model: MambaVisionBackbone,
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    uint8: bool = False,
    batch_size: int = 1,
    calibration: Calibration | None = None,
) -> Report:
    """Write `model` as an ExecuTorch program, reload it and compare it with PyTorch on photographs.

    Input and outputs are those of `export_onnx`, for `batch_size` pictures of the model's own size and no others, since
    memory is planned when the file is written. Methods without arguments give the metadata, one each, as JSON:
    `image_size()`, `mean()`, ...

    Args:
        model: a classifier or a backbone; it is left as it is.
        path: file to write, ending in .pte; it appears only after it has been compared.
        dtype: `float32`, or `int8` for the weights and inputs of linear layers and convolutions, the rest in float32.
        uint8: take pictures as bytes and normalise them inside.
        batch_size: pictures a call.
        calibration: as for `export_onnx`.

    Raises:
        ExportError: executorch is not installed.
        DifferenceError: the reloaded file computes something else; nothing is left behind.
        ValueError: no such type, another suffix, a batch size below 1, a network without weights, for other than 1 or
            3 channels, or no pictures.
    """
    check_request("executorch", dtype, calibration)
    check_model(model)
    path = Path(as_path(path, "executorch"))
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    with packages("Export to ExecuTorch", INSTALL):
        import executorch.runtime  # noqa: F401  (`open_file` needs it)

    graph = Graph(model, uint8=uint8)
    example = blank_input(graph, batch_size, model.config.preprocessing.img_size)
    batches: list[Tensor] = []
    if dtype == "int8":
        batches = calibration_batches(model, calibration, uint8=uint8, batch_size=batch_size)

    def write(draft: Path) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the exporter
            program = torch.export.export(graph, (example,), strict=False)
            if batches:
                program = torch.export.export(_quantize(program, batches), (example,), strict=False)
            lowered = _lower(program, metadata(model), quantized=bool(batches))
            with draft.open("wb") as file:
                lowered.write_to_file(file)
        return len(lowered.executorch_program.execution_plan[0].chains[0].instructions)

    return write_checked(
        model,
        path,
        runtime="ExecuTorch",
        dtype=dtype,
        uint8=uint8,
        write=write,
        load=open_file,
        batch_size=batch_size,
        calibration=describe_calibration(calibration, batches) if batches else None,
    )


def open_file(path: Path) -> Run:
    """The program in ExecuTorch's runtime."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")

    def run(pictures: Tensor) -> Sequence[Tensor]:
        found = method.execute([pictures.contiguous()])  # it reads memory in this order whatever the strides
        return [value.clone() for value in found]  # the program's own memory otherwise

    return run


def _lower(program: torch.export.ExportedProgram, about: dict[str, str], *, quantized: bool) -> Any:
    """The program for ExecuTorch, with XNNPACK's kernels wherever it has them."""
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.generic_node_configs import ConstantPadConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = program.run_decompositions({torch.ops.aten.gelu.default: _decompose_gelu})
    # XNNPACK's padding takes no quantised tensor, which shows only when the file is loaded.
    kernels = [config for config in ALL_PARTITIONER_CONFIGS if not (quantized and config is ConstantPadConfig)]
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner(kernels)], constant_methods=about)
    return edge.to_executorch()


def _decompose_gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """The tanh form in its parts: XNNPACK's one operation for GELU is the exact form, whichever was asked for."""
    if approximate != "tanh":
        return NotImplemented
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def _quantize(program: torch.export.ExportedProgram, batches: list[Tensor]) -> torch.nn.Module:
    """The program with 8-bit linear layers and convolutions, calibrated by torchao, which ExecuTorch brings."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer()
    config = get_symmetric_quantization_config(is_per_channel=True)
    for operator in (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default):
        quantizer.set_operator_type(operator, config)
    prepared = prepare_pt2e(program.module(), quantizer)
    with torch.inference_mode():
        for batch in batches:
            prepared(batch)
    converted: torch.nn.Module = convert_pt2e(prepared)
    return converted
