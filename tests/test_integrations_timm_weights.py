"""Weights through timm: from every source it has, equal to what our loader makes of them, and as strict."""

import logging
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from deterministic_weights import deterministic_state_dict
from mambavision import create_model
from mambavision.config import VARIANTS
from mambavision.weights import WEIGHTS, CheckpointError, fetching, save_checkpoint
from weight_files import hub_cache, public_archive, public_config, public_repository

timm = pytest.importorskip("timm")
pytest.importorskip("mambavision.integrations.timm")
models = timm.models

TINY = "mamba_vision_test_tiny"


def weights(**arguments):
    state = create_model(TINY, device="meta", **arguments).state_dict()
    return deterministic_state_dict({name: tensor.shape for name, tensor in state.items()})


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The same weights in each public layout."""
    folder = tmp_path_factory.mktemp("files")
    wrapped = {f"module.{name}": tensor for name, tensor in weights().items()}
    own = folder / "own.safetensors"
    save_checkpoint(own, weights(), VARIANTS[TINY])
    repository = public_repository(folder / "repository", weights(), public_config(VARIANTS[TINY]))
    return {
        "archive": public_archive(folder / "archive.pth.tar", weights()),
        "wrapped archive": public_archive(folder / "wrapped.pth.tar", wrapped),
        "own": own,
        "repository": repository / "model.safetensors",
    }


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetching.say_license.cache_clear()


def assert_equal(actual, expected, *, but=()):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert name.startswith(but) or torch.equal(actual[name], tensor), name


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["archive", "wrapped archive", "own", "repository"])
def test_a_checkpoint_is_what_our_loader_makes_of_it(files, layout):
    expected = create_model(TINY, checkpoint_path=files[layout])
    assert_equal(timm.create_model(TINY, checkpoint_path=str(files[layout])), expected)
    overlay = {"file": str(files[layout])}
    assert_equal(timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay=overlay), expected)


@pytest.mark.parametrize(("layout", "channels"), [("archive", 1), ("repository", 4), ("own", 6)])
def test_channels_are_adapted_as_ours_are(files, layout, channels):
    overlay = {"file": str(files[layout])}
    model = timm.create_model(TINY, pretrained=True, in_chans=channels, pretrained_cfg_overlay=overlay)
    assert_equal(model, create_model(TINY, checkpoint_path=files[layout], in_chans=channels))


@pytest.mark.parametrize("layout", ["archive", "repository"])
def test_another_number_of_classes_gets_a_fresh_head(files, layout):
    overlay = {"file": str(files[layout])}
    model = timm.create_model(TINY, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    assert_equal(model, create_model(TINY, checkpoint_path=files[layout], num_classes=3), but=("head.",))
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.5)


def test_a_backbone_takes_a_whole_checkpoint(files):
    overlay = {"file": str(files["repository"])}
    arguments = {"features_only": True, "out_indices": (1, 3)}
    model = timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = create_model(TINY, checkpoint_path=files["repository"], **arguments)(images)
    assert all(torch.equal(left, right) for left, right in zip(model(images), expected, strict=True))


def test_a_state_dict_in_memory():
    overlay = {"state_dict": weights()}
    model = timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.norm.weight, weights()["norm.weight"])


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [10, 3])  # with another number timm alone would let what is missing pass
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("levels.3.blocks.1.mixer.qkv.weight"), "1 missing: levels.3.blocks.1.mixer.qkv"),
        (lambda state: state.pop("patch_embed.conv_down.0.weight"), "1 missing: patch_embed.conv_down.0.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (lambda state: state.update({"norm.bias": torch.zeros(3)}), r"of another shape: norm.bias \(checkpoint \(3,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message, classes):
    state = weights()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        timm.create_model(TINY, pretrained=True, num_classes=classes, pretrained_cfg_overlay={"state_dict": state})


def test_a_checkpoint_path_is_strict(tmp_path):
    state = weights()
    del state["norm.bias"]
    with pytest.raises(RuntimeError, match=r"norm\.bias"):
        timm.create_model(TINY, checkpoint_path=str(public_archive(tmp_path / "a.pth.tar", state)))


@pytest.mark.parametrize("way", ["checkpoint_path", "file"])
def test_a_pickle_that_asks_for_code_does_not_run(tmp_path, way):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = str(public_archive(tmp_path / "payload.pth.tar", weights(), beside=Payload()))
    arguments = {"checkpoint_path": path}
    if way == "file":
        arguments = {"pretrained": True, "pretrained_cfg_overlay": {"file": path}}
    with pytest.raises(RuntimeError, match="weights_only"):
        timm.create_model(TINY, **arguments)
    assert not (tmp_path / "ran").exists()


# --- repositories and folders -----------------------------------------------------------------------------------------


def test_the_public_layout_from_the_hub_says_its_license(tmp_path, caplog):
    """A small network's weights in the public repository's place."""
    spec = WEIGHTS["mamba_vision_T"]
    files = public_repository(tmp_path / "files", weights(), public_config(VARIANTS[TINY]))
    cache = hub_cache(tmp_path / "cache", spec.repo_id, files)
    overlay = {"hf_hub_id": spec.repo_id, "hf_hub_filename": "model.safetensors"}
    for _ in range(2):
        model = timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache)
    assert_equal(model, create_model(TINY, checkpoint_path=files))
    (record,) = (record for record in caplog.records if record.name.startswith("mambavision"))
    assert record.levelno == logging.WARNING
    assert "CC-BY-NC-SA-4.0" in record.message


def test_weights_of_your_own_have_no_license_of_others(files, caplog):
    timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay={"file": str(files["own"])})
    timm.create_model("mamba_vision_nano_32", pretrained=True)
    assert not [record for record in caplog.records if record.name.startswith("mambavision")]


ARGUMENTS = {"img_size": (64, 96), "in_chans": 1, "num_classes": 3, "global_pool": "max", "mixer_order": "mamba_only"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network of unusual arguments and the folder that timm saved it to."""
    folder = tmp_path_factory.mktemp("saved")
    model = timm.create_model(TINY, **ARGUMENTS).eval()
    models.save_for_hf(model, folder, model_args=ARGUMENTS, safe_serialization=True)
    return model, folder


@pytest.mark.parametrize("source", ["local-dir", "hf-hub"])
def test_a_saved_network_comes_back(saved, source, tmp_path):
    model, folder = saved
    arguments = {}
    if source == "hf-hub":
        arguments["cache_dir"] = hub_cache(tmp_path / "cache", "me/mine", folder)
    name = f"local-dir:{folder}" if source == "local-dir" else "hf-hub:me/mine"
    back = timm.create_model(name, pretrained=True, **arguments).eval()
    images = torch.randn(2, 1, 64, 96)
    assert torch.equal(back(images), model(images))
    assert back.config == model.config
    assert tuple(back.pretrained_cfg["input_size"][1:]) == (64, 96)
    backbone = timm.create_model(name, pretrained=True, features_only=True, **arguments).eval()
    expected = model.forward_intermediates(images, intermediates_only=True)
    assert all(torch.equal(left, right) for left, right in zip(backbone(images), expected, strict=True))


def test_a_saved_network_is_adapted_on_the_way(saved):
    model, folder = saved
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5, img_size=128).eval()
    assert_equal(other, model, but=("head.",))
    assert (other.num_classes, other.config.window_size[2:]) == (5, (8, 4))
    assert tuple(other.pretrained_cfg["input_size"][1:]) == (128, 128)


def test_our_loader_reads_what_timm_saved(saved):
    model, folder = saved
    arguments = {key: value for key, value in ARGUMENTS.items() if key != "global_pool"}
    assert_equal(create_model(TINY, checkpoint_path=folder, **arguments), model)
