"""Resizing as graph operations: Pillow's pixels, and the ONNX file that has them in front."""

import numpy as np
import pytest
import torch
from torchvision.transforms import Compose

from mambavision import Predictor, create_model
from mambavision.cli import main
from mambavision.config import Preprocessing
from mambavision.export.onnx import export_onnx, open_file
from mambavision.export.resize import ResizeAndCrop
from mambavision.inference.images import read_image
from mambavision.inference.picture_files import SAMPLES
from mambavision.inference.preprocess import build_transform

CAT = SAMPLES / "cat.jpg"


def photograph(size):
    return read_image(CAT).resize(size)


@pytest.mark.parametrize("size", [(384, 384), (251, 333), (97, 411), (64, 64), (40, 31), (1000, 30), (1, 1)], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"img_size": (32, 32)},
        {"img_size": (128, 128), "crop_pct": 0.875},
        {"img_size": (64, 96)},
        {"img_size": (64, 96), "crop_mode": "squash", "crop_pct": 0.95},
        {"img_size": (100, 100), "interpolation": "bilinear"},
    ],
    ids=str,
)
def test_pixels_are_those_of_pillow(settings, size):
    preprocessing = Preprocessing(**settings)
    picture = photograph(size)
    expected = np.asarray(Compose(build_transform(preprocessing).transforms[:-2])(picture)).astype(int)
    found = ResizeAndCrop(preprocessing)(torch.from_numpy(np.array(picture))[None])
    assert found.dtype == torch.uint8
    assert found.shape == (1, *preprocessing.img_size, 3)
    difference = np.abs(found[0].numpy().astype(int) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.35  # where Pillow takes the two directions in the other order


@pytest.fixture(scope="module")
def whole(onnx_exporter, tmp_path_factory):
    model = create_model("mamba_vision_nano_32", pretrained=True)
    return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "whole.onnx", resize=True)


@pytest.mark.parametrize("size", [(384, 384), (251, 333), (70, 40), (32, 32)], ids=str)
def test_a_file_takes_pictures_of_any_size(whole, size):
    model, report = whole
    pictures = [photograph(size), read_image(SAMPLES / "dog.jpg").resize(size)]
    (found,) = open_file(report.path)(torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]))
    with torch.inference_mode():
        inputs = [build_transform(model.config.preprocessing)(picture) for picture in pictures]
        expected = model(torch.stack(inputs))
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    assert torch.equal(found.argmax(1), expected.argmax(1))


def test_the_graph_is_standard_and_compared(whole):
    import onnx

    _, report = whole
    proto = onnx.load(report.path)
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    (taken,) = proto.graph.input
    assert (taken.name, taken.type.tensor_type.elem_type) == ("pixels", onnx.TensorProto.UINT8)
    assert [dim.dim_param or dim.dim_value for dim in taken.type.tensor_type.shape.dim] == [
        "batch",
        "height",
        "width",
        3,
    ]
    onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    assert 0 < report.error < 5e-3
    assert report.agreement == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_other_types_resize_too(onnx_exporter, dtype, tmp_path):
    report = export_onnx(
        create_model("mamba_vision_nano_32", pretrained=True), tmp_path / "a.onnx", dtype=dtype, resize=True
    )
    (expected,) = Predictor(device="cpu")([CAT])
    (found,) = open_file(report.path)(torch.from_numpy(np.array(read_image(CAT)))[None])
    assert found.argmax() == expected.indices[0]


def test_a_grey_backbone(onnx_exporter, tmp_path):
    model = create_model("mamba_vision_test_tiny", in_chans=1, features_only=True).eval()
    report = export_onnx(model, tmp_path / "maps.onnx", resize=True)
    maps = open_file(report.path)(torch.randint(0, 256, (2, 90, 50, 1), dtype=torch.uint8))
    assert [tuple(found.shape[2:]) for found in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]


def test_only_onnx_has_it(capsys):
    assert main(["export", "mamba_vision_nano_32", "--format", "aoti", "--resize"]) == 2
    assert "--resize works only with onnx, not with aoti." in capsys.readouterr().err


@pytest.mark.slow
def test_maps_of_a_trained_network_differ_by_more_than_its_classes(onnx_exporter, tmp_path):
    model = create_model("mamba_vision_nano_32", pretrained=True, features_only=True)
    report = export_onnx(model, tmp_path / "maps.onnx", resize=True)
    assert 0.01 < report.error < 0.1
