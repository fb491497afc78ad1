"""What only a GPU shows of training: CUDA graphs under accumulation and MESA, half precision without NaN."""

import pytest
import torch

from mambavision import create_model
from mambavision.data.config import AugmentConfig
from mambavision.engine.config import LossConfig, OptimConfig, RuntimeConfig, TrainConfig
from mambavision.engine.step import TrainingStep

pytestmark = pytest.mark.gpu
CLASSES = [f"class {number}" for number in range(10)]


def train(steps, *, precision="float32", compile=False, mode="default", accumulate=1, mesa=0.0):
    config = TrainConfig(
        augment=AugmentConfig(crop="pad"),
        loss=LossConfig(mesa_weight=mesa),  # from a quarter of the training on
        optim=OptimConfig(lr=1e-3, ema=0.9, clip_grad=1.0),
        runtime=RuntimeConfig(
            device="cuda", precision=precision, channels_last=True, compile=compile, compile_mode=mode, log_every=steps
        ),
        epochs=2,
        batch_size=16,
        accumulate=accumulate,
    )
    torch.manual_seed(0)
    model = create_model("mamba_vision_test_tiny", class_names=CLASSES, device="cuda")
    step = TrainingStep(
        model.to(memory_format=torch.channels_last), config, steps_per_epoch=steps, device=torch.device("cuda")
    )
    draw = torch.Generator().manual_seed(1)
    for number in range(steps):
        batches = [
            (
                torch.randint(0, 256, (16, 64, 64, 3), dtype=torch.uint8, generator=draw),
                torch.randint(0, 10, (16,), generator=draw),
            )
            for _ in range(accumulate)
        ]
        step.run(number, batches)
    return [loss for _, _, loss, _ in step.read_history()]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(("accumulate", "mesa"), [(1, 0.0), (3, 0.0), (2, 1.0)])
def test_compiled_training_follows_eager_training(mode, accumulate, mesa):
    expected = train(8, accumulate=accumulate, mesa=mesa)
    losses = train(8, compile=True, mode=mode, accumulate=accumulate, mesa=mesa)
    assert losses == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_without_nan_and_near_float32(precision):
    expected = train(30)
    losses = train(30, precision=precision)
    assert losses == pytest.approx(expected, rel=0.05)
