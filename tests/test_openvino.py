"""OpenVINO: the two files compute the same in each type, and tell what the network expects."""

import json

import pytest
import torch

from mambavision import create_model
from mambavision.export.openvino import export_openvino, open_file

pytest.importorskip("openvino")
for _package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(_package)

TINY = "mamba_vision_test_tiny"


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    torch.manual_seed(0)
    model = create_model(TINY, features_only=True).eval()
    return model, export_openvino(model, tmp_path_factory.mktemp("openvino") / "maps.xml", uint8=True)


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 128, 64), (1, 97, 70), (1, 5, 200)])
def test_a_backbone_gives_the_same_maps_of_any_picture(maps, shape):
    model, report = maps
    pixels = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(v) for v in (model.config.preprocessing.mean, model.config.preprocessing.std))
    with torch.inference_mode():
        expected = model(((pixels / 255 - mean) / std).permute(0, 3, 1, 2))
    for ours, theirs in zip(expected, open_file(report.path)(pixels), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=2e-5 * ours.abs().max().item())


def test_the_files_are_two_and_tell_the_preprocessing(maps):
    import openvino

    model, report = maps
    files = sorted(report.path.parent.iterdir())
    assert [file.name for file in files] == ["maps.bin", "maps.xml"]
    assert report.size == sum(file.stat().st_size for file in files)
    read = openvino.Core().read_model(report.path)
    assert json.loads(read.get_rt_info(["model_info", "image_size"]).astype(str)) == [64, 64]
    assert [output.any_name for output in read.outputs] == [f"stride_{r}" for r in model.feature_info.reduction()]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "share", "error"), [("float16", 0.6, 5e-3), ("int8", 0.4, 0.2)])
def test_smaller_types_give_smaller_files(tmp_path, dtype, share, error):
    model = create_model("mamba_vision_nano_32", pretrained=True)
    report = export_openvino(model, tmp_path / "nano.xml", dtype=dtype)
    assert report.size < share * 4 * sum(parameter.numel() for parameter in model.parameters())
    assert report.error < error
    assert report.agreement == 1
    assert (report.calibration is None) == (dtype != "int8")
