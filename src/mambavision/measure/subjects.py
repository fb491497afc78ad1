"""What is measured: a network of ours or of timm's, made ready in one of several ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mambavision.config import VARIANTS, UnknownVariantError, get_config
from mambavision.factory import create_model
from mambavision.inference.fuse import fuse
from mambavision.inference.optimization import optimize
from mambavision.measure.memory import fitting, is_out_of_memory
from mambavision.models.backbone import MambaVisionBackbone
from mambavision.models.complexity import count_complexity

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Way(NamedTuple):
    """How a network is made ready; `prepared` is for our own networks alone, and `casts` where it chooses the types."""

    prepared: Callable[[Any, torch.dtype], nn.Module] | None = None
    compiled: bool = False
    casts: bool = False


WAYS = {
    "eager": Way(),
    "compile": Way(compiled=True),
    "fused": Way(lambda model, _: fuse(model)),
    "fused-compile": Way(lambda model, _: fuse(model), compiled=True),
    "optimized": Way(lambda model, dtype: optimize(model, dtype=dtype), casts=True),
    "optimized-full": Way(lambda model, dtype: optimize(model, dtype=dtype, mode="full"), casts=True),
    "optimized-float8": Way(lambda model, _: optimize(model, dtype=torch.float8_e4m3fn), casts=True),
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network that is ready to be timed.

    Attributes:
        name: of the network.
        way: a key of `WAYS`.
        dtype: of weights and pictures.
        model: the network itself, folded or optimised where the way says so.
        run: one forward pass, of pictures (batch, 3, height, width) in channels-last order; compiled where it says so.
        parameters: number of parameters.
        macs: multiply-adds of one picture, the scan's included.
        img_size: height and width in pixels.
        device: where it runs.
    """

    name: str
    way: str
    dtype: str
    model: Any
    run: Callable[[Tensor], Any]
    parameters: int
    macs: int
    img_size: tuple[int, int]
    device: torch.device

    def pictures(self, batch_size: int) -> Tensor:
        """Random pictures, since zeros can be faster."""
        pictures = torch.randn(batch_size, 3, *self.img_size, device=self.device, dtype=TYPES[self.dtype])
        return pictures.to(memory_format=torch.channels_last)


def prepare(
    name: str, *, way: str, dtype: str, device: torch.device, img_size: tuple[int, int] | None = None
) -> Subject:
    """Make `name` ready: random weights, channels-last, evaluation mode.

    Args:
        name: a variant of ours, or any model of timm's where that is installed.
        way: a key of `WAYS`.
        dtype: a key of `TYPES`.
        device: where it runs.
        img_size: height and width in pixels; None takes the network's own.

    Raises:
        UnknownVariantError: neither ours nor timm's.
        OutOfMemoryError: its weights do not fit.
        ValueError: the way is for our networks alone, does not run here or not in this type, or the network does not
            take this size.
    """
    prepared, compiled, casts = WAYS[way]
    check_name(name)
    if way == "optimized-float8" and dtype != "bfloat16":
        raise ValueError(f"{way} computes in bfloat16 around its 8-bit products; choose that type, not {dtype}.")
    remedy = "choose another model or device" if img_size is None else "choose another --img-size, model or device"
    with fitting(f"{name} ({way}, {dtype})", device, remedy):
        if name in VARIANTS:
            model: nn.Module = create_model(name, device=device).eval()
            size = img_size or get_config(name).preprocessing.img_size
        else:
            if prepared is not None:
                raise ValueError(f"{way} is for our own networks alone; time {name} by eager or compile.")
            model, size = _from_timm(name, img_size)
            model = model.to(device, TYPES[dtype])  # now: some keep what they form of their weights in the first pass
        parameters = sum(parameter.numel() for parameter in model.parameters())
        macs = _macs(name, model, size)
        if prepared is not None:
            model = prepared(model, TYPES[dtype])
        if not casts:
            model = model.to(dtype=TYPES[dtype], memory_format=torch.channels_last)  # type: ignore[call-overload]
    run: Callable[[Tensor], Any] = model
    if compiled:  # CUDA graphs where there are any: launches would hide what the kernels do
        # For one batch size at a time: `timing.measure` has it compiled anew for the next.
        run = torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else None, dynamic=False)
    return Subject(
        name=name,
        way=way,
        dtype=dtype,
        model=model,
        run=run,
        parameters=parameters,
        macs=macs,
        img_size=size,
        device=device,
    )


def check_name(name: str) -> None:
    """UnknownVariantError for what is neither a variant of ours nor a model of timm's."""
    if name in VARIANTS:
        return
    try:
        import timm
    except ImportError:
        more = "timm, which may have it, is missing: pip install timm."
    else:
        if timm.is_model(name):
            return
        more = "timm has no such model either."
    try:
        get_config(name)
    except UnknownVariantError as error:
        raise UnknownVariantError(f"{error} {more}") from None


def _from_timm(name: str, img_size: tuple[int, int] | None) -> tuple[nn.Module, tuple[int, int]]:
    import timm

    sized: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    try:
        model: Any = timm.create_model(name, **sized)
    except TypeError:  # a convolutional network takes any size and no argument for it
        model = timm.create_model(name)
    except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise _refusal(name, img_size, error) from error
    height, width = model.pretrained_cfg["input_size"][1:]
    # Without gradients: where they are wanted, PyTorch's counter of operations fails on some networks.
    return model.eval().requires_grad_(False), img_size or (height, width)


@torch.no_grad()
def _macs(name: str, model: nn.Module, size: tuple[int, int]) -> int:
    if isinstance(model, MambaVisionBackbone):
        return count_complexity(create_model(name, device="meta"), size).macs
    counter, weight = FlopCounterMode(display=False), next(model.parameters())
    try:
        with counter, sdpa_kernel(SDPBackend.MATH):  # not every device's fused attention is counted
            model(torch.zeros(1, 3, *size, device=weight.device, dtype=weight.dtype))
    except Exception as error:  # timm's models check sizes in many ways, or fail on those that they do not take
        if is_out_of_memory(error):
            raise
        raise _refusal(name, size, error) from error
    return counter.get_total_flops() // 2


def _refusal(name: str, size: tuple[int, int] | None, error: Exception) -> ValueError:
    pictures = "pictures of its own size" if size is None else f"pictures of {size[0]} x {size[1]}"
    return ValueError(f"{name} does not take {pictures}: {first_line(error)}.")


def first_line(error: Exception) -> str:
    """What it says first; others' errors may go on for pages."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).removesuffix(".")
