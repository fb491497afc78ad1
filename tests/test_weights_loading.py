"""Tensors into networks: strict, with three adaptations that are said."""

import logging

import pytest
import torch
from torch import nn

from mambavision.config import get_config
from mambavision.models.backbone import MambaVisionBackbone
from mambavision.models.classifier import MambaVision
from mambavision.weights import (
    CheckpointError,
    adapt_first_conv,
    load_weights,
    read_checkpoint,
    save_checkpoint,
)
from weight_files import public_archive, public_config, public_repository

TINY = get_config("mamba_vision_test_tiny")
FIRST = "patch_embed.conv_down.0.weight"


def filled(seed: int, **changes) -> MambaVision:
    """A network whose every tensor differs from the initialisation."""
    torch.manual_seed(seed)
    model = MambaVision(TINY.replace(**changes)).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + 0.1)
    return model


@pytest.fixture
def source() -> MambaVision:
    return filled(1)


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64)


def test_public_files_give_the_same_logits(tmp_path, source, pictures):
    files = [
        public_archive(tmp_path / "a.pth.tar", source.state_dict()),
        public_repository(tmp_path / "hub", source.state_dict(), public_config(TINY)),
        tmp_path / "ours.safetensors",
    ]
    save_checkpoint(files[-1], source.state_dict(), TINY)
    for file in files:
        model = filled(2)
        assert load_weights(model, read_checkpoint(file).state_dict) == []
        assert model(pictures).equal(source(pictures))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_into_float32(tmp_path, source, dtype):
    save_checkpoint(tmp_path / "half", source.state_dict(), TINY, dtype=dtype)
    model = filled(2)
    load_weights(model, read_checkpoint(tmp_path / "half").state_dict)
    for name, tensor in model.state_dict().items():
        expected = source.state_dict()[name]
        assert tensor.dtype == expected.dtype
        assert tensor.equal(expected.to(dtype).to(expected.dtype)), name


def test_every_misfit_is_listed(source):
    state_dict = source.state_dict()
    state_dict["levels.9.extra"] = torch.zeros(1)
    del state_dict["norm.weight"]
    state_dict["norm.bias"] = torch.zeros(3)
    model = filled(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, state_dict)
    said = str(caught.value)
    assert said.startswith("The checkpoint does not fit MambaVision")
    assert "1 missing: norm.weight;" in said
    assert "1 unexpected: levels.9.extra;" in said
    assert "1 of another shape: norm.bias (checkpoint (3,), model (64,))." in said
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_long_lists_are_cut_and_counted(source):
    tensors = [name for name in source.state_dict() if name.startswith("levels.")]
    state_dict = {name: tensor for name, tensor in source.state_dict().items() if name not in tensors}
    with pytest.raises(CheckpointError, match=f"{len(tensors)} missing: .* and {len(tensors) - 8} more") as caught:
        load_weights(source, state_dict)
    assert tensors[7] in str(caught.value)
    assert tensors[8] not in str(caught.value)


# The classifier


def test_another_number_of_classes_needs_permission(source):
    with pytest.raises(CheckpointError, match="into 10 classes and the model into 4; give num_classes"):
        load_weights(filled(2, num_classes=4), source.state_dict())


def test_another_number_of_classes_keeps_the_fresh_head(source, caplog):
    model = filled(2, num_classes=4)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith("head.")}
    said = load_weights(model, source.state_dict(), allow_head_change=True)
    assert said == [
        "The checkpoint's head for 10 classes is dropped; "
        "the one for 4 classes is freshly initialised and needs training."
    ]
    assert [(record.levelno, record.message) for record in caplog.records] == [(logging.WARNING, said[0])]
    for name, tensor in model.state_dict().items():
        assert tensor.equal(fresh[name] if name in fresh else source.state_dict()[name]), name


def test_permission_changes_nothing_when_the_classes_fit(source, pictures):
    model = filled(2)
    assert load_weights(model, source.state_dict(), allow_head_change=True) == []
    assert model(pictures).equal(source(pictures))


def test_permission_covers_the_head_alone(source):
    state_dict = {name: tensor for name, tensor in source.state_dict().items() if name != "norm.bias"}
    with pytest.raises(CheckpointError, match=r"1 missing: norm\.bias\."):
        load_weights(filled(2, num_classes=4), state_dict, allow_head_change=True)


def test_a_checkpoint_without_a_head(source):
    headless = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("head.")}
    with pytest.raises(CheckpointError, match="into 0 classes and the model into 10"):
        load_weights(filled(2), headless)
    (said,) = load_weights(filled(2), headless, allow_head_change=True)
    assert "head for 0 classes is dropped" in said


def test_a_model_without_a_head(source, pictures):
    model = filled(2, num_classes=0)
    (said,) = load_weights(model, source.state_dict())
    assert said == "The model has no place for head.weight, head.bias; they are dropped."
    torch.testing.assert_close(model(pictures), source.forward_head(source.forward_features(pictures), pre_logits=True))


def test_a_backbone_takes_a_full_checkpoint(source, pictures):
    backbone = MambaVisionBackbone(TINY).eval()
    (said,) = load_weights(backbone, source.state_dict())
    assert said.startswith("The model has no place for norm.weight, norm.bias, ")
    assert said.endswith("head.weight, head.bias; they are dropped.")
    for ours, theirs in zip(backbone(pictures), source.forward_intermediates(pictures)[1], strict=True):
        assert ours.equal(theirs)


def test_a_backbone_is_still_strict(source):
    state_dict = {**source.state_dict(), "neck.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"does not fit MambaVisionBackbone.* 1 unexpected: neck\.weight\."):
        load_weights(MambaVisionBackbone(TINY), state_dict)


# The first convolution


@pytest.mark.parametrize("in_chans", [1, 2, 4, 5, 6, 7, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_channels_are_adapted_as_timm_does(in_chans, dtype):
    timm_manipulate = pytest.importorskip("timm.models._manipulate")
    weight = torch.randn(8, 3, 3, 3).to(dtype)
    expected = timm_manipulate.adapt_input_conv(in_chans, weight.clone())
    adapted = adapt_first_conv(weight, in_chans)
    assert adapted.shape == (8, in_chans, 3, 3)
    assert adapted.dtype == dtype
    torch.testing.assert_close(adapted, expected, rtol=0, atol=0)


def test_one_channel_is_exact_for_grey_pictures(source):
    model = filled(2, in_chans=1)
    said = load_weights(model, source.state_dict())
    assert said == [f"{FIRST} is adapted from 3 to 1 input channel."]
    grey = torch.rand(1, 1, 64, 64)
    torch.testing.assert_close(model(grey), source(grey.expand(-1, 3, -1, -1)))


def test_more_channels_are_adapted_and_said(source, caplog):
    model = filled(2, in_chans=4)
    assert load_weights(model, source.state_dict()) == [f"{FIRST} is adapted from 3 to 4 input channels."]
    assert "from 3 to 4 input channels" in caplog.text
    weight = source.state_dict()[FIRST]
    torch.testing.assert_close(model.state_dict()[FIRST], weight[:, [0, 1, 2, 0]] * 0.75)
    assert source.state_dict()[FIRST] is not model.state_dict()[FIRST]


def test_channels_and_classes_at_once(source):
    assert len(load_weights(filled(2, in_chans=1, num_classes=3), source.state_dict(), allow_head_change=True)) == 2


def test_only_colour_weights_are_adapted():
    with pytest.raises(CheckpointError, match="4 channels and the model for 3.*in_chans=4"):
        load_weights(filled(2), filled(1, in_chans=4).state_dict())


# The meta device


def test_a_model_on_the_meta_device_gets_the_tensors(tmp_path, source, pictures):
    save_checkpoint(tmp_path / "half", source.state_dict(), TINY, dtype=torch.float16)
    model = MambaVision(TINY, device="meta").eval()
    load_weights(model, read_checkpoint(tmp_path / "half").state_dict)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())
    reference = filled(2)
    load_weights(reference, read_checkpoint(tmp_path / "half").state_dict)
    assert model(pictures).equal(reference(pictures))


def test_a_fresh_head_on_the_meta_device_is_refused(source):
    model = MambaVision(TINY.replace(num_classes=4), device="meta")
    with pytest.raises(CheckpointError, match=r"head\.weight, head\.bias would stay on the meta device"):
        load_weights(model, source.state_dict(), allow_head_change=True)


def test_parameters_stay_the_same_objects(source):
    model = filled(2)
    before = [id(parameter) for parameter in model.parameters()]
    load_weights(model, source.state_dict())
    assert [id(parameter) for parameter in model.parameters()] == before
