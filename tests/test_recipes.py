import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from mambavision.cli.train import parse
from mambavision.config import VARIANTS, get_config
from mambavision.data.transforms import build_train_transform

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
IMAGENET = [path for path in RECIPES if path.stem.startswith("imagenet1k")]


def load(path):
    return parse([f"--config={path}", "--data=somewhere"], Console(quiet=True))[0]


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {"cifar10_nano", "finetune", "imagenet1k_tiny"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_run(path):
    config = load(path)
    assert config.data.dir == "somewhere"
    assert config.output == f"runs/{path.stem}"
    model = get_config(config.model.name).replace(**config.model.overrides)
    build_train_transform(config.augment, model.preprocessing)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_header_tells_how_it_is_run_and_what_it_gave(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"mambavision train --config recipes/{path.name} --data" in line for line in header)
    assert any(re.match(r"# (Measured: \d|Not run here\.|Not measured: )", line) for line in header)


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_the_published_settings(path):
    config = load(path)
    assert config.model.name in VARIANTS
    assert config.batch_size * config.accumulate == 4096
    published = yaml.safe_load(
        "{mamba_vision_T: [0.05, 20, 0.5, 0.25], mamba_vision_T2: [0.05, 20, 0.75, 0.25], "
        "mamba_vision_S: [0.05, 20, 1.0, 0.25], mamba_vision_B: [0.075, 35, 1.0, 0.3], "
        "mamba_vision_L: [0.12, 20, 6.0, 0.25], mamba_vision_L2: [0.12, 20, 6.0, 0.25]}"
    )
    optim, loss = config.optim, config.loss
    found = [optim.weight_decay, optim.warmup_epochs, loss.mesa_weight, loss.mesa_start]
    assert found == published[config.model.name]
    assert (optim.name, optim.lr, optim.min_lr, optim.ema) == ("lamb", 5e-3, 5e-6, 0.9998)
