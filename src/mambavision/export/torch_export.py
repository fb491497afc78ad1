"""torch.export: the folded network as a `.pt2` that PyTorch alone loads, for any batch and picture size."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from mambavision.export.check import Report, Run, check_model, write_checked
from mambavision.export.formats import as_path, check_request
from mambavision.export.graph import Graph, metadata, trace_program
from mambavision.models.backbone import MambaVisionBackbone

METADATA = "metadata.json"  # the file's entry with what `graph.metadata` tells


def export_torch(
    model: MambaVisionBackbone, path: str | os.PathLike[str], *, dtype: str = "float32", uint8: bool = False
) -> Report:
    """Write `model` with `torch.export.save`, reload it and compare it with PyTorch on photographs.

    Input and outputs are those of `export_onnx`; batch, height and width are dynamic. The operations are PyTorch's own,
    so the file runs on a GPU as well (`torch.export.passes.move_to_device_pass`).

    Args:
        model: a classifier or a backbone; it is left as it is.
        path: file to write, ending in .pt2; it appears only after it has been compared.
        dtype: `float32`, or `float16` for weights and all but the scan.
        uint8: take pictures as bytes and normalise them inside.

    Raises:
        DifferenceError: the reloaded file computes something else; nothing is left behind.
        ValueError: no such type, another suffix, a network without weights, or for other than 1 or 3 channels.
    """
    check_request("torch-export", dtype)
    check_model(model)
    path = Path(as_path(path, "torch-export"))
    graph = Graph(model, uint8=uint8, dtype=getattr(torch, dtype))

    def write(draft: Path) -> int:
        program = trace_program(graph)
        torch.export.save(program, draft, extra_files={METADATA: json.dumps(metadata(model))})
        return sum(node.op == "call_function" for node in program.graph.nodes)

    return write_checked(model, path, runtime="torch.export", dtype=dtype, uint8=uint8, write=write, load=open_file)


def open_file(path: Path) -> Run:
    """The file's operations as a module."""
    module = torch.export.load(path).module()

    @torch.inference_mode()
    def run(pictures: Tensor) -> list[Tensor]:
        found = module(pictures)
        return [found] if isinstance(found, Tensor) else list(found)

    return run
