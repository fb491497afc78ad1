"""Numbers of 8 bits, float8_e4m3fn: 3 bits of mantissa, up to 448. Values beyond that are cut, not made NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from mambavision.ops.backend import Backend, Situation, select, situation_of, triton_fault
from mambavision.ops.float8.reference import LARGEST, to_float8_reference

OLDEST_CAPABILITY = (8, 9)  # of a GPU that multiplies such numbers


def refuse_float8_kernels(situation: Situation) -> str | None:
    """Why the kernels that multiply 8-bit numbers cannot run, or None."""
    if situation.device_type != "cuda":
        return f"{situation.device_type} is no CUDA GPU"
    if torch.version.hip is not None:
        return "AMD's GPUs have another type of 8 bits"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        return f"a GPU of compute capability {capability[0]}.{capability[1]} multiplies no 8-bit numbers"
    if situation.differentiated:
        return "its kernels have no backward"
    return triton_fault()


def _triton(x: Tensor) -> Tensor:
    from mambavision.ops.float8.triton_op import to_float8

    y: Tensor = to_float8(x)
    return y


BACKENDS = (
    Backend("triton", _triton, "GPU kernel", refuse_float8_kernels),
    Backend("reference", to_float8_reference, "plain PyTorch, runs everywhere", lambda _: None),
)


def to_float8(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Round to float8_e4m3fn; what is larger than 448 is cut to it.

    Args:
        x: any floating type and shape.
        backend: `auto`, or the name of one of `BACKENDS`.

    Returns:
        Like x, without gaps, its dimensions in the same order in memory.

    Raises:
        RuntimeError: the requested backend cannot run here.
    """
    return select("to_float8", BACKENDS, situation_of(x), backend).backend.function(x)


def scaled_to_float8(weight: Tensor, *, together: bool = False) -> tuple[Tensor, Tensor]:
    """A weight as 8-bit numbers and the scale of each of its outputs, so that their product is the weight, rounded.

    Args:
        weight: (columns, ...), any floating type.
        together: whether all outputs have the same scale.

    Returns:
        float8_e4m3fn like the weight, and float32 (columns,). The largest number of each output, or of all, becomes
        448.
    """
    largest = weight.float().abs().flatten(1).amax(1)
    if together:
        largest = largest.amax().expand(largest.shape)
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    return to_float8(weight.float() / scale.reshape(-1, *[1] * (weight.dim() - 1))), scale


__all__ = ["BACKENDS", "LARGEST", "refuse_float8_kernels", "scaled_to_float8", "to_float8"]
