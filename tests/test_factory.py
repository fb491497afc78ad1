"""`create_model` as the public README of the original calls it, and what else it takes."""

import pytest
import torch

from deterministic_weights import deterministic_state_dict
from mambavision import create_model, list_models
from mambavision.config import VARIANTS, UnknownVariantError
from mambavision.weights import CheckpointError, save_checkpoint

TINY = "mamba_vision_test_tiny"


def weights(name, **arguments):
    model = create_model(name, device="meta", **arguments)
    return deterministic_state_dict({key: tensor.shape for key, tensor in model.state_dict().items()})


@pytest.fixture(scope="module")
def own_checkpoint(tmp_path_factory):
    config = VARIANTS[TINY].replace(class_names=tuple("abcdefghij"))
    path = tmp_path_factory.mktemp("own") / "tiny.safetensors"
    save_checkpoint(path, weights(TINY), config, metrics={"top1": 12.5})
    return path


def test_lists_the_variants():
    assert list_models() == list(VARIANTS)
    assert list_models("*_l2*") == ["mamba_vision_L2", "mamba_vision_L2_512_21k"]
    assert list_models("resnet*") == []


def test_the_public_snippet(tmp_path):
    """create_model('mamba_vision_T', pretrained=True, model_path=...) with the public archive's layout."""
    path = tmp_path / "mambavision_tiny_1k.pth.tar"
    torch.save({"state_dict": weights("mamba_vision_T"), "epoch": 300}, path)
    model = create_model("mamba_vision_T", pretrained=True, model_path=str(path))
    assert not model.training
    assert torch.equal(model.state_dict()["head.weight"], weights("mamba_vision_T")["head.weight"])


def test_unknown_names_and_arguments_are_errors():
    with pytest.raises(UnknownVariantError, match="mamba_vision_T"):
        create_model("mamba_vision_tiny")
    with pytest.raises(TypeError, match="no argument 'drop_paths'; did you mean drop_path_rate"):
        create_model(TINY, drop_paths=0.1)
    with pytest.raises(ValueError, match="drop_path_rate"):
        create_model(TINY, drop_path_rate=2.0)
    with pytest.raises(TypeError, match="name must be a string, got 5"):
        create_model(5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": True, "checkpoint_path": "a"}, "not both"),
        ({"model_path": "a"}, "pretrained=True"),
        ({"out_indices": (1,)}, "features_only=True"),
        ({"num_classes": 3, "class_names": ["a"]}, "contradicts"),
        ({"class_names": "cat"}, "list of names, got the string 'cat'"),
        ({"in_chans": 0}, "in_chans must be a positive integer, got 0"),
        ({"window_size": 7}, "window_size"),
    ],
)
def test_contradictions_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(TINY, **arguments)


def test_a_checkpoint_of_ours_carries_everything(own_checkpoint):
    model = create_model(None, checkpoint_path=own_checkpoint)
    assert model.config.class_names == tuple("abcdefghij")
    assert model.config.depths == VARIANTS[TINY].depths
    assert not model.training
    with pytest.raises(ValueError, match="model name"):
        create_model(None)


def test_a_checkpoint_that_names_no_network_asks_for_it(tmp_path):
    torch.save(create_model(TINY).state_dict(), tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match=r"bare\.pth does not say which network it is of: name the model, too"):
        create_model(None, checkpoint_path=tmp_path / "bare.pth")


def test_a_checkpoint_of_another_architecture_is_named(own_checkpoint):
    with pytest.raises(CheckpointError, match=r"does not hold a mamba_vision_T: it has dim 8 instead of 80"):
        create_model("mamba_vision_T", checkpoint_path=own_checkpoint)


def test_a_fine_tuned_file_is_not_taken_for_the_published_weights(tmp_path):
    path = tmp_path / "mine.safetensors"
    save_checkpoint(path, weights(TINY, num_classes=2), VARIANTS[TINY].replace(num_classes=2))
    with pytest.raises(CheckpointError, match="checkpoint_path"):
        create_model("mamba_vision_T", pretrained=True, model_path=path)


def test_preprocessing_may_be_given():
    model = create_model(TINY, preprocessing={"img_size": 48, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    assert (model.config.preprocessing.img_size, model.config.preprocessing.mean) == ((48, 48), (0.5,) * 3)
    with pytest.raises(TypeError, match="size"):
        create_model(TINY, preprocessing={"size": 48})


def test_another_class_count_makes_a_new_head(own_checkpoint, caplog):
    model = create_model(TINY, checkpoint_path=own_checkpoint, num_classes=3)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert model.config.class_names is None
    assert "head" in caplog.text
    assert torch.equal(model.norm.weight, weights(TINY)["norm.weight"])
    named = create_model(TINY, checkpoint_path=own_checkpoint, class_names=["cat", "dog"])
    assert named.config.class_names == ("cat", "dog")


@pytest.mark.parametrize(("channels", "mean"), [(1, 1), (4, 4)])
def test_other_channels_adapt_weights_and_statistics(own_checkpoint, channels, mean):
    model = create_model(TINY, checkpoint_path=own_checkpoint, in_chans=channels)
    assert model(torch.zeros(1, channels, 64, 64)).shape == (1, 10)
    assert len(model.config.preprocessing.mean) == mean


def test_one_channel_of_a_grey_picture_gives_what_three_gave(own_checkpoint):
    grey = torch.randn(2, 1, 64, 64)
    three = create_model(TINY, checkpoint_path=own_checkpoint)
    one = create_model(TINY, checkpoint_path=own_checkpoint, in_chans=1)
    torch.testing.assert_close(one(grey), three(grey.expand(-1, 3, -1, -1)))


def test_image_size_sets_windows_and_preprocessing():
    model = create_model("mamba_vision_T", img_size=512, device="meta")
    assert model.config.window_size == (8, 8, 32, 16)
    assert model.config.preprocessing.img_size == (512, 512)
    assert create_model("mamba_vision_T", img_size=(224, 448), device="meta").config.window_size == (8, 8, 28, 14)
    assert create_model("mamba_vision_T", window_size=[8, 8, 7, 7], device="meta").config.window_size == (8, 8, 7, 7)


def test_features_only_takes_a_full_checkpoint(own_checkpoint):
    backbone = create_model(TINY, checkpoint_path=own_checkpoint, features_only=True, out_indices=(0, -1))
    maps = backbone(torch.zeros(1, 3, 64, 64))
    assert [tuple(feature_map.shape) for feature_map in maps] == [(1, 8, 16, 16), (1, 64, 2, 2)]
    assert backbone.feature_info.channels() == [8, 64]


def test_device_and_type():
    model = create_model(TINY, device="meta", dtype=torch.float16)
    assert {(tensor.device.type, tensor.dtype) for tensor in model.parameters()} == {("meta", torch.float16)}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        create_model(TINY, checkpoint_path=tmp_path / "nothing.safetensors")


def test_the_same_seed_gives_the_same_network():
    torch.manual_seed(3)
    first = create_model(TINY).state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(first[name], tensor) for name, tensor in create_model(TINY).state_dict().items())
