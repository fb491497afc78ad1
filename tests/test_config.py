"""The table of variants and the checks of a configuration."""

import dataclasses
import json
import typing

import pytest
import torch

from mambavision import create_model
from mambavision.config import VARIANTS, MambaVisionConfig, Preprocessing, UnknownVariantError, get_config

TINY = VARIANTS["mamba_vision_test_tiny"]


@pytest.mark.parametrize("name", VARIANTS)
def test_survives_json(name):
    config = VARIANTS[name]
    assert MambaVisionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_names_unknown_fields():
    with pytest.raises(ValueError, match="colour, size"):
        MambaVisionConfig.from_dict({**TINY.to_dict(), "size": 1, "colour": 2})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("mamba_vision_t", "mamba_vision_T"), ("mambavision_L2", "mamba_vision_L2"), ("tiny", "mamba_vision_test_tiny")],
)
def test_an_unknown_name_answers_with_the_nearest(name, nearest):
    with pytest.raises(UnknownVariantError, match=nearest) as error:
        get_config(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim must be a positive integer, got 0"),
        ({"depths": (1, 2, 3)}, "depths must be 4 positive integers"),
        ({"num_heads": (1, 1, 3, 4)}, "num_heads 3 of level 2 does not divide its 32 channels"),
        ({"window_size": (8, 8, 0, 7)}, "window_size"),
        ({"stem_strides": (3, 1)}, "stem_strides"),
        ({"d_conv": 2}, "d_conv must be a positive odd integer, got 2"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
        ({"mixer_order": "random"}, "mixer_order must be one of mamba_first"),
        ({"dt_bias_init": "ones"}, "dt_bias_init"),
        ({"class_names": ("a", "b")}, "class_names has 2 entries for num_classes=10"),
        ({"num_classes": -1}, "num_classes"),
        ({"depths": 3}, "depths must be 4 positive integers, one a level, got 3"),
        ({"drop_path_rate": "0.1"}, "drop_path_rate must be a number"),
        ({"drop_rate": None}, "drop_rate must be a number"),
        ({"mlp_ratio": "4"}, "mlp_ratio must be a number"),
        ({"mlp_ratio": 0.01}, "hidden channel, got 0.01"),
        ({"layer_scale": -1}, "layer_scale must be a positive number or None, got -1"),
        ({"class_names": "abcdefghij"}, "must be a list of names"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio must be a number"),
        ({"layer_scale": float("nan")}, "layer_scale must be a positive number"),
        ({"preprocessing": 224}, "preprocessing must be a Preprocessing or its fields, got 224"),
    ],
)
def test_a_bad_field_is_named_with_its_value(changes, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": 0}, "img_size"),
        ({"crop_pct": 1.5}, "crop_pct"),
        ({"crop_mode": "stretch"}, "crop_mode"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"mean": (0.5,)}, "one entry a channel"),
        ({"std": (0.5, 0.5, 0)}, "std must be positive"),
    ],
)
def test_a_bad_preprocessing_field_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**changes)


def _changed(field: dataclasses.Field) -> object:
    """Another valid value of a field of the tiny configuration."""
    others = {
        "dim": 16,
        "in_dim": 16,
        "depths": (1, 1, 3, 2),
        "num_heads": (1, 1, 4, 4),
        "window_size": (8, 8, 2, 2),
        "stem_strides": (2, 1),
        "mlp_ratio": 2.0,
        "d_state": 4,
        "d_conv": 5,
        "mixer_order": "mamba_only",
        "dt_bias_init": "log_uniform",
        "layer_scale": None,
        "layer_scale_conv": None,
        "drop_rate": 0.5,
        "attn_drop_rate": 0.5,
        "drop_path_rate": 0.5,
        "num_classes": 5,
        "in_chans": 1,
    }
    return others[field.name]


@pytest.mark.parametrize(
    "field",
    # class names and preprocessing describe the model's ends and are used by prediction, not by the network; the
    # convolutional levels do not use the first two heads and windows
    [field for field in dataclasses.fields(MambaVisionConfig) if field.name not in ("class_names", "preprocessing")],
    ids=lambda field: field.name,
)
def test_every_field_changes_the_network(field):
    def fingerprint(config):
        torch.manual_seed(0)
        model = create_model("mamba_vision_test_tiny", **{field.name: getattr(config, field.name)}).train()
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():  # make every branch count
            if name.endswith(("gamma", "gamma_1", "gamma_2")):
                torch.nn.init.ones_(parameter)
        x = torch.randn(4, model.config.in_chans, 64, 64)
        return shapes, model(x)

    shapes, logits = fingerprint(TINY)
    other_shapes, other_logits = fingerprint(TINY.replace(**{field.name: _changed(field)}))
    assert shapes != other_shapes or not torch.equal(logits, other_logits)


def test_windows_cover_the_map_of_the_native_size():
    for config in VARIANTS.values():
        assert config.window_for(config.preprocessing.img_size) == config.window_size


def test_types_of_the_table_are_those_declared():
    hints = typing.get_type_hints(MambaVisionConfig)
    assert set(hints) == {field.name for field in dataclasses.fields(MambaVisionConfig)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.dim = 4
