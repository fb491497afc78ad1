"""Where a forward pass spends its time: the share of each part of the network, and the operations that cost most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mambavision.layers.attention import Attention
from mambavision.layers.conv_block import ConvBlock
from mambavision.layers.mixer import MambaVisionMixer
from mambavision.layers.stem import Downsample, Stem
from mambavision.layers.token_block import Mlp
from mambavision.models.backbone import MambaVisionBackbone

# Parts that do not lie within each other; what is left is windows, norms and sums.
PARTS: dict[type[nn.Module], str] = {
    Stem: "stem",
    ConvBlock: "convolution blocks",
    Downsample: "down-sampling",
    MambaVisionMixer: "scan mixers",
    Attention: "attention",
    Mlp: "MLPs",
}
REST = "norms, sums, windows, head"


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a part or an operation takes of a pass.

    Attributes:
        name: of the part or operation.
        milliseconds: a pass.
        share: of the whole, in 0..1.
        calls: a pass.
    """

    name: str
    milliseconds: float
    share: float
    calls: float


def profile_parts(model: MambaVisionBackbone, pictures: Tensor, *, passes: int = 10) -> list[Share]:
    """Time of each part, largest first; medians over `passes`, each module waited for, so launches count too.

    Args:
        model: in evaluation mode, uncompiled and unfused.
        pictures: (batch, channels, height, width) on its device.
        passes: timed passes, after two to warm up.
    """
    device = pictures.device
    rows: list[dict[str, float]] = []
    calls: dict[str, int] = {}
    with torch.inference_mode(), _clocked(model, device) as (times, counts):
        for _ in range(passes + 2):
            times.clear()
            counts.clear()
            start = _now(device)
            model(pictures)
            whole = _now(device) - start
            rows.append({**times, REST: whole - sum(times.values())})
            calls = {**counts, REST: 1}
    medians = {name: statistics.median(row[name] for row in rows[2:]) for name in rows[-1]}
    total = sum(medians.values())
    shares = [
        Share(name=name, milliseconds=1e3 * value, share=value / total, calls=calls[name])
        for name, value in medians.items()
    ]
    return sorted(shares, key=lambda share: -share.milliseconds)


def profile_operations(model: nn.Module, pictures: Tensor, *, passes: int = 5, top: int = 15) -> list[Share]:
    """The operations, on a GPU the kernels, that take most of a pass, largest first.

    Args:
        model: in evaluation mode.
        pictures: (batch, channels, height, width) on its device.
        passes: profiled passes, after two to warm up.
        top: how many to return.
    """
    cuda = pictures.is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.inference_mode():
        for _ in range(2):
            model(pictures)
        with profile(activities=activities) as profiler:
            for _ in range(passes):
                model(pictures)
            if cuda:
                torch.cuda.synchronize()
    events = profiler.key_averages()
    if cuda:
        timed = [(event, event.self_device_time_total) for event in events if event.device_type.name == "CUDA"]
    else:
        timed = [(event, event.self_cpu_time_total) for event in events]
    total = sum(microseconds for _, microseconds in timed) or 1.0
    shares = [
        Share(
            name=event.key,
            milliseconds=microseconds / passes / 1e3,
            share=microseconds / total,
            calls=event.count / passes,
        )
        for event, microseconds in timed
    ]
    return sorted(shares, key=lambda share: -share.milliseconds)[:top]


@contextmanager
def _clocked(model: nn.Module, device: torch.device) -> Iterator[tuple[dict[str, float], dict[str, int]]]:
    """Seconds and calls of each part, summed while the context lasts."""
    times: dict[str, float] = {}
    counts: dict[str, int] = {}
    started: list[float] = []
    handles = []
    for module in model.modules():
        if type(module) not in PARTS:
            continue
        part = PARTS[type(module)]

        def begin(*_: object) -> None:
            started.append(_now(device))

        def end(*_: object, part: str = part) -> None:
            times[part] = times.get(part, 0.0) + _now(device) - started.pop()
            counts[part] = counts.get(part, 0) + 1

        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield times, counts
    finally:
        for handle in handles:
            handle.remove()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
