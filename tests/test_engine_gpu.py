"""What only a GPU shows of training: CUDA graphs under accumulation and MESA, half precision without NaN."""

import pytest
import torch
import torch.nn.functional as F

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


def gradient(device, precision, *, compiled=False):
    """That of the packaged model's loss, as one vector of float64; `precision` is autocast's, or float64 throughout."""
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randn(32, 3, 32, 32, generator=draw)
    labels = torch.randint(0, 10, (32,), generator=draw)
    dtype = torch.float64 if precision == "float64" else torch.float32
    model = create_model("mamba_vision_nano_32", pretrained=True, drop_path_rate=0.0).to(device, dtype).train()
    model = model.to(memory_format=torch.channels_last)
    run = torch.compile(model) if compiled else model
    half = getattr(torch, precision) if precision in ("bfloat16", "float16") else torch.bfloat16
    with torch.autocast(device, half, enabled=precision in ("bfloat16", "float16")):
        loss = F.cross_entropy(run(pictures.to(device, dtype)), labels.to(device))
    loss.backward()
    return torch.cat([parameter.grad.double().flatten().cpu() for parameter in model.parameters()])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_gradients_through_the_kernels_are_as_near_float64_as_pytorchs_own(precision, compiled):
    """End to end, at most twice as far; beside a CPU, which has no kernels of ours."""
    torch.compiler.reset()
    truth, usual = gradient("cpu", "float64"), gradient("cpu", precision)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = gradient("cuda", precision, compiled=compiled)
    far, usually = ((vector - truth).norm() / truth.norm() for vector in (found, usual))
    assert far <= 2 * usually + 1e-5, f"{far:.2e} {usually:.2e}"
