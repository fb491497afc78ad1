"""The table of published weights against the table of variants and the public names."""

import importlib
import json
import re

import pytest

from mambavision.config import VARIANTS
from mambavision.weights import WEIGHTS, table

PUBLIC = [variant for variant in WEIGHTS if variant != "mamba_vision_nano_32"]
REPOSITORIES = {"T-1K", "T2-1K", "S-1K", "B-1K", "L-1K", "L2-1K", "B-21K", "L-21K"}
REPOSITORIES |= {"L2-512-21K", "L3-256-21K", "L3-512-21K"}


def test_every_variant_with_weights_exists_and_only_the_test_variant_has_none():
    assert list(WEIGHTS) == [variant for variant in VARIANTS if variant != "mamba_vision_test_tiny"]
    assert all(spec.variant == variant for variant, spec in WEIGHTS.items())


def test_public_repositories():
    assert {WEIGHTS[variant].repo_id for variant in PUBLIC} == {f"nvidia/MambaVision-{name}" for name in REPOSITORIES}
    assert WEIGHTS["mamba_vision_L2_512_21k"].repo_id == "nvidia/MambaVision-L2-512-21K"
    assert WEIGHTS["mamba_vision_T"].url == "https://huggingface.co/nvidia/MambaVision-T-1K"


@pytest.mark.parametrize("variant", PUBLIC)
def test_a_row_is_consistent_with_its_variant(variant):
    spec = WEIGHTS[variant]
    assert spec.license == "CC-BY-NC-SA-4.0"
    assert ("21K" in spec.trained_on) == variant.endswith("_21k") == ("21k" in spec.pth_name)
    side = VARIANTS[variant].preprocessing.img_size[0]
    if named := re.search(r"_(256|512)(_|$)", variant):
        assert side == int(named[1])
        assert spec.pth_name.endswith(f"_{side}.pth.tar")
    assert 80 < spec.top1 < spec.top5 < 100


def test_numbers_of_our_own_model_come_from_its_record(tmp_path, monkeypatch):
    record = {"top1": 96.5, "top5": 99.9, "parameters": 3_000_000, "gmacs": 0.5, "seed": 0}
    (tmp_path / "mamba_vision_nano_32.json").write_text(json.dumps(record))
    monkeypatch.setattr(table, "ASSETS", tmp_path)
    spec = table._shipped("mamba_vision_nano_32", "CIFAR-10")
    assert (spec.top1, spec.top5, spec.parameters, spec.gmacs) == (96.5, 99.9, 3_000_000, 0.5)
    assert (spec.repo_id, spec.pth_name, spec.url, spec.license) == (None, None, None, "Apache-2.0")
    assert spec.asset == tmp_path / "mamba_vision_nano_32.safetensors"


def test_a_source_tree_without_the_trained_model_has_no_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ASSETS", tmp_path)
    spec = table._shipped("mamba_vision_nano_32", "CIFAR-10")
    assert (spec.top1, spec.top5, spec.parameters, spec.gmacs) == (None, None, None, None)


def test_parameter_counts_are_those_of_the_networks():
    """The counts in the table against networks built without memory."""
    classifier = importlib.import_module("mambavision.models.classifier")
    for variant in PUBLIC:
        model = classifier.MambaVision(VARIANTS[variant], device="meta")
        assert sum(parameter.numel() for parameter in model.parameters()) == WEIGHTS[variant].parameters, variant
