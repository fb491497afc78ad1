import copy
import math

import pytest
import torch

from mambavision import create_model
from mambavision.data.config import AugmentConfig
from mambavision.engine.config import LossConfig, OptimConfig, RuntimeConfig, TrainConfig
from mambavision.engine.step import TrainingStep
from training_data import pictures

CPU = torch.device("cpu")
PLAIN_SGD = {"momentum": 0.0, "nesterov": False}


def make_step(*, epochs=10, accumulate=1, steps_per_epoch=4, **groups):
    torch.manual_seed(0)
    model = create_model("mamba_vision_test_tiny", num_classes=3, img_size=32)
    config = TrainConfig(epochs=epochs, accumulate=accumulate, **groups)
    return TrainingStep(model, config, steps_per_epoch=steps_per_epoch, device=CPU)


def batch(count=8, seed=0):
    images, labels = pictures(count, seed)
    return torch.from_numpy(images), torch.from_numpy(labels)


def weights(step):
    return {name: tensor.clone() for name, tensor in step.model.state_dict().items()}


def test_steps_lower_the_loss():
    step = make_step(optim=OptimConfig(lr=3e-3))
    for number in range(15):
        step.run(number, [batch()])
    losses = [loss for _, _, loss, _ in step.read_history()]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_follows_full_precision(precision):
    histories = []
    for kind in ("float32", precision):
        step = make_step(runtime=RuntimeConfig(precision=kind, channels_last=True))
        for number in range(4):
            step.run(number, [batch()])
        histories.append([loss for _, _, loss, _ in step.read_history()])
    assert histories[0] == pytest.approx(histories[1], rel=0.02)
    assert histories[0] != histories[1]


def test_checkpointing_trains_the_same(monkeypatch):
    from mambavision.models import backbone

    calls, checkpoint = [], backbone.checkpoint
    monkeypatch.setattr(
        backbone, "checkpoint", lambda *args, **kwargs: (calls.append(1), checkpoint(*args, **kwargs))[1]
    )
    trained, counts = [], []
    for asked in (False, True):
        step = make_step(runtime=RuntimeConfig(grad_checkpointing=asked))
        step.run(0, [batch()])
        trained.append(weights(step))
        counts.append(len(calls))
    assert counts[0] == 0
    assert counts[1] >= 4  # a block in each level at least
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-4, atol=1e-5)


def test_gradients_of_accumulated_batches_are_those_of_one_large_batch():
    images, labels = batch(8)
    steps = [make_step(accumulate=parts, optim=OptimConfig(name="sgd", kwargs=PLAIN_SGD)) for parts in (1, 2)]
    for step in steps:  # batch statistics would differ between the whole and its parts
        step.model.eval()
        step.model.train = lambda: None
    steps[0].run(0, [(images, labels)])
    steps[1].run(0, [(images[:4], labels[:4]), (images[4:], labels[4:])])
    for one, two in zip(steps[0].model.parameters(), steps[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)
    assert steps[0].read_history()[0][2:] == pytest.approx(steps[1].read_history()[0][2:], rel=1e-4)


def test_clipping_limits_the_update():
    moved = {}
    for clip in (None, 1e-3):
        step = make_step(optim=OptimConfig(name="sgd", weight_decay=0.0, lr=1.0, clip_grad=clip, kwargs=PLAIN_SGD))
        before = torch.nn.utils.parameters_to_vector(step.model.parameters()).clone()
        step.run(0, [batch()])
        after = torch.nn.utils.parameters_to_vector(step.model.parameters())
        moved[clip] = (after - before).norm().item()
        ((_, _, _, norm),) = step.read_history()
        assert norm == pytest.approx(moved[None], rel=1e-2)  # what is logged is the norm before clipping
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-2)


def test_weight_decay_spares_biases_norms_and_the_scan():
    step = make_step()
    decayed = {id(p) for group in step.optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    names = {name for name, parameter in step.model.named_parameters() if id(parameter) in decayed}
    assert names
    assert all(name.endswith("weight") and "norm" not in name for name in names)
    assert any(name.endswith("in_proj.weight") for name in names)


def test_the_schedule_warms_up_falls_and_rests():
    optim = OptimConfig(lr=1.0, warmup_epochs=2, warmup_lr=0.1, min_lr=0.01, cooldown_epochs=3)
    step = make_step(epochs=10, steps_per_epoch=4, optim=optim)
    rates = []
    for number in range(40):
        step.set_step(number)
        rates.append(step.learning_rate)
    assert rates[0] == pytest.approx(0.1)
    assert rates[:9] == sorted(rates[:9])
    assert rates[8] == 1.0
    assert rates[18] == pytest.approx((1.0 + 0.01) / 2)  # half-way down
    assert rates[8:] == sorted(rates[8:], reverse=True)
    assert rates[28:] == pytest.approx([0.01] * 12)


def test_the_moving_average_is_evaluated():
    step = make_step(optim=OptimConfig(ema=0.5, ema_warmup=False))
    before = weights(step)
    assert step.averaged is not step.model
    step.run(0, [batch()])  # timm takes over the first step's weights
    step.run(1, [batch()])
    middle = {name: tensor.clone() for name, tensor in step.averaged.state_dict().items()}
    step.run(2, [batch()])
    for name, tensor in step.averaged.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (middle[name] + step.model.state_dict()[name]) / 2)
    assert any(not torch.equal(tensor, step.averaged.state_dict()[name]) for name, tensor in before.items())
    assert make_step().averaged.__class__.__name__ == "MambaVision"


def test_mesa_pulls_towards_the_moving_average_from_its_start_on():
    mesa = LossConfig(mesa_weight=5.0, mesa_start=0.5)
    losses = {}
    for name, loss in (("plain", LossConfig()), ("mesa", mesa)):
        step = make_step(epochs=2, steps_per_epoch=4, loss=loss, optim=OptimConfig(ema=0.99, lr=1e-2))
        for number in range(6):
            step.run(number, [batch()])
        losses[name] = [row[2] for row in step.read_history()]
    assert losses["plain"][:4] == losses["mesa"][:4]
    assert losses["mesa"][4] > losses["plain"][4]


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_nothing_changes_after_a_step_that_is_not_finite(name):
    step = make_step(optim=OptimConfig(name=name))
    step.run(0, [batch()])
    before = weights(step)
    with torch.no_grad():
        saved = step.model.head.bias[0].item()
        step.model.head.bias[0] = math.inf
    step.run(1, [batch()])
    with torch.no_grad():
        step.model.head.bias[0] = saved
    step.run(2, [batch()])  # finite, and yet too late
    for parameter, tensor in step.model.named_parameters():
        torch.testing.assert_close(tensor, before[parameter], rtol=0, atol=0)
    losses = [loss for _, _, loss, _ in step.read_history()]
    assert [math.isfinite(loss) for loss in losses] == [True, False, True]


def test_state_continues_exactly():
    optim = OptimConfig(ema=0.9, warmup_epochs=1)
    augment = AugmentConfig(mixup=0.2, erasing=0.5)
    whole, first, second = (make_step(optim=optim, augment=augment) for _ in range(3))
    for number in range(6):
        whole.run(number, [batch(seed=number)])
    for number in range(3):
        first.run(number, [batch(seed=number)])
    second.load_state_dict(copy.deepcopy(first.state_dict()), step=3)
    for number in range(3, 6):
        second.run(number, [batch(seed=number)])
    assert whole.read_history()[3:] == second.read_history()
    for name, tensor in whole.averaged.state_dict().items():
        assert torch.equal(tensor, second.averaged.state_dict()[name])


def test_a_continued_run_takes_new_settings():
    old, new = (make_step(optim=OptimConfig(lr=rate, weight_decay=decay)) for rate, decay in ((1e-3, 0.1), (4e-3, 0.2)))
    old.run(0, [batch()])
    new.load_state_dict(old.state_dict(), step=20)
    assert new.learning_rate == pytest.approx(2e-3)  # half-way down a cosine of 40 steps
    assert max(group["weight_decay"] for group in new.optimizer.param_groups) == 0.2
    assert torch.equal(*(next(iter(step.optimizer.state.values()))["exp_avg"] for step in (old, new)))
