import dataclasses

import pytest
import yaml

from mambavision.data.config import AugmentConfig, DataConfig
from mambavision.engine.config import LossConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (ModelConfig, {"pretrained": True, "checkpoint": "x.pt"}, "checkpoint='x.pt'"),
        (ModelConfig, {"overrides": {"num_classes": 3}}, "num_classes"),
        (DataConfig, {"val_split": 1.0}, "val_split .* 1.0"),
        (DataConfig, {"workers": -1}, "workers .* -1"),
        (DataConfig, {"limit_train": 0}, "limit_train .* 0"),
        (AugmentConfig, {"crop": "rc"}, "crop .*'rc'"),
        (AugmentConfig, {"mix_mode": "all"}, "mix_mode .*'all'"),
        (AugmentConfig, {"erasing": 1.5}, "erasing .* 1.5"),
        (AugmentConfig, {"mixup": -0.1}, "mixup .* -0.1"),
        (AugmentConfig, {"scale": (1.0, 0.5)}, r"scale .*\(1.0, 0.5\)"),
        (LossConfig, {"smoothing": 1.0}, "smoothing .* 1.0"),
        (LossConfig, {"mesa_weight": -1.0}, "mesa_weight .* -1.0"),
        (OptimConfig, {"lr": 0.0}, "lr .* 0.0"),
        (OptimConfig, {"lr": 1e-6, "min_lr": 1e-5}, "min_lr .* 1e-06, got 1e-05"),
        (OptimConfig, {"clip_grad": 0.0}, "clip_grad .* 0.0"),
        (OptimConfig, {"ema": 1.0}, "ema .* 1.0"),
        (OptimConfig, {"warmup_epochs": -1}, "warmup_epochs .* -1"),
        (RuntimeConfig, {"precision": "half"}, "precision .*'half'"),
        (RuntimeConfig, {"log_every": 0}, "log_every .* 0"),
        (TrainConfig, {"epochs": 0}, "epochs .* 0"),
        (TrainConfig, {"batch_size": 3, "augment": AugmentConfig(mixup=0.2)}, "batch_size .* 3"),
        (TrainConfig, {"loss": LossConfig(mesa_weight=1.0)}, "mesa_weight 1.0 .*optim.ema"),
        (
            TrainConfig,
            {"epochs": 5, "optim": OptimConfig(warmup_epochs=3, cooldown_epochs=2)},
            "epochs .* 5 ",
        ),
    ],
)
def test_a_value_out_of_range_is_named(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_every_setting_is_documented():
    for kind in (ModelConfig, DataConfig, AugmentConfig, LossConfig, OptimConfig, RuntimeConfig, TrainConfig):
        for field in dataclasses.fields(kind):
            assert f"        {field.name}: " in kind.__doc__


def test_settings_are_plain_values():
    settings = TrainConfig(augment=AugmentConfig(mixup=0.2)).to_dict()
    assert settings["augment"]["mixup"] == 0.2
    yaml.safe_dump({key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()})
