"""ExecuTorch: programs compute the same in both types, at their one size, and tell what the network expects."""

import json

import pytest
import torch
import torch.nn.functional as F

from mambavision import create_model
from mambavision.export.executorch import _decompose_gelu, export_executorch, open_file

TINY = "mamba_vision_test_tiny"


def test_the_tanh_form_is_taken_apart_and_the_exact_one_left():
    x = torch.linspace(-6, 6, 1001)
    torch.testing.assert_close(_decompose_gelu(x, approximate="tanh"), F.gelu(x, approximate="tanh"))
    assert _decompose_gelu(x) is NotImplemented


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_classifier_computes_the_same(tmp_path, dtype):
    pytest.importorskip("executorch")
    from executorch.runtime import Runtime

    model = create_model("mamba_vision_nano_32", pretrained=True)
    report = export_executorch(model, tmp_path / "nano.pte", dtype=dtype)
    assert report.size < (0.35 if dtype == "int8" else 1.1) * 4 * sum(p.numel() for p in model.parameters())
    assert report.error < (0.2 if dtype == "int8" else 1e-5)
    assert report.agreement == 1
    (names,) = Runtime.get().load_program(report.path).load_method("class_names").execute([])
    assert json.loads(names) == list(model.config.class_names)


@pytest.mark.slow
def test_a_backbone_takes_a_batch_of_bytes_in_any_memory_order(tmp_path):
    pytest.importorskip("executorch")
    torch.manual_seed(0)
    model = create_model(TINY, features_only=True).eval()
    report = export_executorch(model, tmp_path / "maps.pte", uint8=True, batch_size=2)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8).permute(0, 2, 3, 1)
    mean, std = (torch.tensor(v) for v in (model.config.preprocessing.mean, model.config.preprocessing.std))
    with torch.inference_mode():
        expected = model(((pixels / 255 - mean) / std).permute(0, 3, 1, 2))
    for ours, theirs in zip(expected, open_file(report.path)(pixels), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=2e-5 * ours.abs().max().item())


def test_a_batch_of_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        export_executorch(create_model(TINY), tmp_path / "none.pte", batch_size=0)
