"""torch.export files: what they compute for any picture, and that they need nothing of ours."""

import json
import subprocess
import sys

import pytest
import torch

from mambavision import create_model
from mambavision.export.torch_export import METADATA, export_torch, open_file

TINY = "mamba_vision_test_tiny"


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    torch.manual_seed(0)
    model = create_model(TINY, features_only=True).eval()
    return model, export_torch(model, tmp_path_factory.mktemp("torch") / "maps.pt2", uint8=True)


# Whole windows, padding in one direction and in both, batch 1 and more, maps of a single pixel.
@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 128, 64), (1, 97, 70), (2, 200, 64), (1, 5, 200), (1, 1, 1)])
def test_a_backbone_gives_the_same_maps_of_any_picture(maps, shape):
    model, report = maps
    pixels = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(v) for v in (model.config.preprocessing.mean, model.config.preprocessing.std))
    with torch.inference_mode():
        expected = model(((pixels / 255 - mean) / std).permute(0, 3, 1, 2))
    for ours, theirs in zip(expected, open_file(report.path)(pixels), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5 * ours.abs().max().item())


def test_the_report_is_of_the_file(maps):
    _, report = maps
    assert report.size == report.path.stat().st_size
    assert report.nodes > 100
    assert 0 < report.error < 1e-4
    assert report.agreement is None


def test_pytorch_alone_loads_it(maps):
    script = (
        "import json, sys, torch; about = {'metadata.json': ''}; "
        "found = torch.export.load(sys.argv[1], extra_files=about).module()"
        "(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)); "
        "assert 'mambavision' not in sys.modules; print(len(found), json.loads(about['metadata.json'])['image_size'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(maps[1].path)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "4 [64, 64]\n", done.stderr


def test_metadata_tells_the_preprocessing(maps):
    about = {METADATA: ""}
    torch.export.load(maps[1].path, extra_files=about)
    values = {name: json.loads(value) for name, value in json.loads(about[METADATA]).items()}
    assert values["mean"] == list(maps[0].config.preprocessing.mean)
    assert "class_names" not in values


@pytest.mark.slow
def test_half_precision_halves_the_file(tmp_path):
    model = create_model("mamba_vision_nano_32", pretrained=True)
    whole, half = (export_torch(model, tmp_path / f"{dtype}.pt2", dtype=dtype) for dtype in ("float32", "float16"))
    assert half.size < 0.6 * whole.size
    assert 1e-5 < half.error < 5e-3
    assert half.agreement == 1
