"""The network as every format traces it: folded, with standard operations, its input and outputs named."""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from mambavision.inference.fuse import FusedMixer, fuse
from mambavision.inference.predictor import class_labels
from mambavision.inference.preprocess import build_transform
from mambavision.models.backbone import MambaVisionBackbone
from mambavision.models.classifier import MambaVision


class Graph(nn.Module):
    """The folded network between an input and outputs that are float32, or pictures as bytes.

    Args:
        model: a classifier or a backbone; it is left as it is.
        uint8: take pictures (batch, height, width, in_chans) as decoded and normalise them inside.
        dtype: type of the weights and of what is computed between; steps and states of the scan stay float32.
        device: where it is traced.
        scan_backend: of `ops.selective_scan`; `chunked` is made of standard operations.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: MambaVisionBackbone,
        *,
        uint8: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        scan_backend: str = "chunked",
    ) -> None:
        super().__init__()
        self.network = fuse(model).to(device=device, dtype=dtype)
        for module in self.network.modules():
            if isinstance(module, FusedMixer):
                module.scan_backend = scan_backend
        self.uint8 = uint8
        self.dtype = dtype
        normalize = normalization(model)
        for name, values in (("mean", normalize.mean), ("std", normalize.std)):
            self.register_buffer(name, 255 * torch.tensor(values, device=device).reshape(-1, 1, 1))
        self.eval()

    def forward(self, x: Tensor) -> Any:
        if self.uint8:
            x = (x.permute(0, 3, 1, 2).float() - self.mean) / self.std
        found = self.network(x.to(self.dtype))
        return found.float() if isinstance(found, Tensor) else [value.float() for value in found]


def normalization(model: MambaVisionBackbone) -> Any:
    """The last step of the model's preprocessing, with `mean` and `std` a channel."""
    return build_transform(model.config.preprocessing, model.config.in_chans).transforms[-1]


def input_name(*, uint8: bool) -> str:
    """What the input is called."""
    return "pixels" if uint8 else "pixel_values"


def has_classes(model: MambaVisionBackbone) -> bool:
    """Whether its output is the logits of classes, and not feature maps or a pooled vector."""
    return isinstance(model, MambaVision) and model.config.num_classes > 0


def output_names(model: MambaVisionBackbone) -> list[str]:
    """What the outputs are called."""
    if isinstance(model, MambaVision):
        return ["logits" if has_classes(model) else "features"]
    return [f"stride_{reduction}" for reduction in model.feature_info.reduction()]


def example_input(graph: Graph) -> Tensor:
    """Pictures whose maps need padding wherever a picture's may: a size that no window of more than a token divides."""
    config = graph.network.config
    rows = 2 + max(config.window_size[2:])
    while any(
        window > 1 and -(-rows * config.reductions[2] // config.reductions[level]) % window == 0
        for level, window in ((2, config.window_size[2]), (3, config.window_size[3]))
    ):
        rows += 1
    return blank_input(graph, 2, (rows * config.reductions[2],) * 2)


def blank_input(graph: Graph, batch: int, size: tuple[int, int]) -> Tensor:
    """Black pictures of one size (height, width)."""
    channels = graph.network.config.in_chans
    shape = (batch, *size, channels) if graph.uint8 else (batch, channels, *size)
    return torch.zeros(shape, dtype=torch.uint8 if graph.uint8 else torch.float32, device=graph.mean.device)


def dynamic_dimensions(*, uint8: bool) -> tuple[dict[int, Any]]:
    """Batch, height and width for `torch.export`."""
    height = 1 if uint8 else 2
    return (dict.fromkeys((0, height, height + 1), torch.export.Dim.DYNAMIC),)


def trace_program(graph: Graph) -> torch.export.ExportedProgram:
    """The graph with batch, height and width dynamic, as `torch.export` writes it down."""
    return trace_module(graph, example_input(graph), dynamic_dimensions(uint8=graph.uint8))


def trace_module(
    module: nn.Module, example: Tensor, dynamic: tuple[dict[int, Any]] | None = None
) -> torch.export.ExportedProgram:
    """The module as `torch.export` writes it down, for inputs like the example but of any size in `dynamic`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        program = torch.export.export(module, (example,), dynamic_shapes=dynamic, strict=False)
    # Tracing notes how the example's sizes compare: that something was padded, that no map is a single pixel, which way
    # one lies in memory. The traced operations are right either way, and the file would refuse pictures that windows
    # divide, and small ones.
    program._guards_code = []
    for size in program.range_constraints:
        program.range_constraints[size] = ValueRanges(1, int_oo)
    return program


def metadata(model: MambaVisionBackbone) -> dict[str, str]:
    """What a caller needs to prepare pictures and name classes; each value is JSON."""
    preprocessing = model.config.preprocessing
    normalize = normalization(model)
    values: dict[str, Any] = {
        "image_size": list(preprocessing.img_size),
        "crop_pct": preprocessing.crop_pct,
        "crop_mode": preprocessing.crop_mode,
        "interpolation": preprocessing.interpolation,
        "mean": list(normalize.mean),
        "std": list(normalize.std),
    }
    if has_classes(model):
        values["class_names"] = list(class_labels(model.config))
    return {name: json.dumps(value) for name, value in values.items()}
