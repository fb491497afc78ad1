"""AOTInductor: compiled files compute the same at any size and batch; minutes of compiling, so all of it is slow."""

import json

import pytest
import torch

from mambavision import create_model
from mambavision.export.aoti import _scan_backend, export_aoti, open_file

TINY = "mamba_vision_test_tiny"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    torch.manual_seed(0)
    model = create_model(TINY, features_only=True).eval()
    return model, export_aoti(model, tmp_path_factory.mktemp("aoti") / "maps.pt2", uint8=True)


@slow
@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 128, 64), (1, 97, 70), (2, 200, 64), (1, 5, 200), (1, 1, 1)])
def test_a_backbone_gives_the_same_maps_of_any_picture(maps, shape):
    model, report = maps
    pixels = torch.randint(0, 256, (shape[0], 3, *shape[1:]), dtype=torch.uint8).permute(0, 2, 3, 1)  # strided
    mean, std = (torch.tensor(v) for v in (model.config.preprocessing.mean, model.config.preprocessing.std))
    with torch.inference_mode():
        expected = model(((pixels / 255 - mean) / std).permute(0, 3, 1, 2))
    for ours, theirs in zip(expected, open_file(report.path)(pixels), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5 * ours.abs().max().item())


@slow
def test_the_file_tells_the_preprocessing_and_the_device(maps):
    model, report = maps
    found = torch._inductor.aoti_load_package(str(report.path)).get_metadata()
    assert json.loads(found["image_size"]) == list(model.config.preprocessing.img_size)
    assert found["AOTI_DEVICE_KEY"] == "cpu"
    assert 0 < report.error < 1e-4


def test_the_scan_is_of_standard_operations_on_a_cpu():
    model = create_model(TINY)
    assert _scan_backend(model, torch.device("cpu"), torch.float32) == "chunked"


@pytest.mark.gpu
@slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_our_kernels_are_in_a_gpus_file(tmp_path, dtype):
    model = create_model("mamba_vision_nano_32", pretrained=True, device="cuda")
    assert _scan_backend(model, torch.device("cuda"), getattr(torch, dtype)) == "triton"
    report = export_aoti(model, tmp_path / "nano.pt2", dtype=dtype)
    assert report.agreement == 1
    assert b"walk_kernel" in report.path.read_bytes()
