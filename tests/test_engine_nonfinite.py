import math

import pytest
import torch
from torch import nn

from mambavision.cli import main
from mambavision.engine.nonfinite import first_bad_layer
from mambavision.engine.step import TrainingStep
from training_data import TINY, make_npz


class Explode(torch.autograd.Function):
    """Finite forwards, infinite backwards."""

    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, gradient):
        return gradient * math.inf


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))


def test_a_parameter_is_named_before_all_else():
    model = network()
    with torch.no_grad():
        model[1][0].bias[2] = math.nan
    assert first_bad_layer(model, lambda: model(torch.ones(1, 4)).sum()) == "the parameter 1.0.bias is not finite"


def test_the_first_layer_with_a_bad_output_is_named():
    model = network()
    with torch.no_grad():
        model[1][0].weight.fill_(3e38)
        model[0].weight.fill_(1.0)
    clause = first_bad_layer(model, lambda: model(torch.ones(1, 4)).sum())
    assert clause.endswith("output that is not finite is that of model.1.0 (Linear)")


def test_the_loss_alone():
    model = network()
    assert "only the loss" in first_bad_layer(model, lambda: model(torch.ones(1, 4)).sum() / 0)


def test_the_first_bad_gradient_backwards_is_named():
    model = network()

    def loss():
        return model[2](Explode.apply(model[1](model[0](torch.ones(1, 4))))).sum()

    clause = first_bad_layer(model, loss)
    assert "gradient" in clause
    assert clause.split()[-1].startswith("1.0.")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_failure_that_does_not_repeat_is_said():
    model = network()
    assert "did not happen again" in first_bad_layer(model, lambda: model(torch.ones(1, 4)).sum())


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_training_stops_with_step_rate_and_layer(tmp_path, monkeypatch, capsys, optimizer):
    """A layer overflows at step 4, which is noticed at step 6; nothing is saved after it."""
    run = TrainingStep.run

    def sabotage(self, step, batches):
        if step == 4:
            with torch.no_grad():
                self.model.levels[2].blocks[0].mlp.fc1.weight.fill_(3e38)
        run(self, step, batches)

    monkeypatch.setattr(TrainingStep, "run", sabotage)
    data = make_npz(tmp_path / "data")
    out = tmp_path / "out"
    command = ["train", *TINY, f"--data={data}", f"--output={out}", "--epochs=2", "--batch-size=4"]
    options = [f"--optim.name={optimizer}", "--runtime.log_every=3", "--runtime.checkpoint_every=4"]
    assert main([*command, *options]) == 1
    message = capsys.readouterr().err
    assert "Step 4 (epoch 1, learning rate 8.3" in message or "Step 4 (epoch 1, learning rate 9." in message
    assert "levels.2.blocks.0.mlp.fc1 (Linear)" in message
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 4
    assert not (out / "best.safetensors").exists()
