"""The packaged model for the page: one picture in, logits and each class's activation map out, weights in float16.

    python web/build_model.py web/dist

Writes `model.onnx`, float32 arithmetic on float16 weights, which the runtime widens when it loads; and `model.json`,
what the page must know to prepare a picture and to name the classes. Needs `pip install -e ".[export]"`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from mambavision import Predictor
from mambavision.export.graph import Graph, trace_module
from mambavision.export.onnx import translate
from mambavision.files import replaced_when_done
from mambavision.inference.images import read_image
from mambavision.inference.picture_files import sample_pictures
from mambavision.inference.preprocess import build_transform
from mambavision.weights import WEIGHTS

MODEL = "mamba_vision_nano_32"
SMALLEST = 1024  # values; smaller weights stay as they are
TOLERANCE = 0.01  # largest difference of a probability to PyTorch


class Mapped(nn.Module):
    """Logits (batch, classes) and what they are the mean of: activations (batch, classes, rows, columns)."""

    def __init__(self, network: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.network = network
        self.head = head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        final = self.network.forward_features(x)  # after the norm
        activations = F.conv2d(final, self.head.weight[:, :, None, None], self.head.bias)
        return activations.mean((2, 3)), activations


def main(folder: Path) -> None:
    """Export, shrink, compare with PyTorch and write."""
    predictor = Predictor(MODEL, device="cpu")
    height, width = predictor.config.preprocessing.img_size
    graph = Mapped(Graph(predictor.model).network, predictor.model.head).eval()
    program = trace_module(graph, torch.zeros(1, 3, height, width))
    proto = translate(program, "pixel_values", ["logits", "activations"])
    halve_weights(proto)
    onnx.checker.check_model(proto, full_check=True)
    data = proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    error = compare(predictor, session)
    if not error < TOLERANCE:
        sys.exit(f"The file's probabilities differ from PyTorch's by {error:.3f}; it was not written.")
    with replaced_when_done(folder / "model.onnx") as temporary:
        temporary.write_bytes(data)
    settings = predictor.config.preprocessing
    about = {
        "name": MODEL,
        "top1": WEIGHTS[MODEL].top1,
        "trained_on": WEIGHTS[MODEL].trained_on,
        "labels": list(predictor.labels),
        "preprocessing": dataclasses.asdict(settings),
        "samples": [path.name for path in sample_pictures()],
    }
    with replaced_when_done(folder / "model.json") as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n")
    print(f"{folder / 'model.onnx'}: {len(data) / 1e6:.1f} MB, probabilities within {error:.4f} of PyTorch's")


def halve_weights(proto: onnx.ModelProto) -> None:
    """Store large float32 weights as float16, each behind a Cast."""
    casts = []
    for weight in proto.graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < SMALLEST:
            continue
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
        casts.append(helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def compare(predictor: Predictor, session: onnxruntime.InferenceSession) -> float:
    """Largest difference of a probability on the sample photographs."""
    transform = build_transform(predictor.config.preprocessing)
    error = 0.0
    for path in sample_pictures():
        inputs = transform(read_image(path))[None]
        logits, activations = session.run(None, {"pixel_values": inputs.numpy()})
        np.testing.assert_allclose(activations.mean((2, 3)), logits, atol=1e-4)
        with torch.inference_mode():
            expected = predictor.model(inputs).softmax(-1)
        found = torch.from_numpy(logits).softmax(-1)
        error = max(error, float((found - expected).abs().max()))
    return error


if __name__ == "__main__":
    main(Path(sys.argv[1]))
