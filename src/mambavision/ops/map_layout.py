"""Maps and weights as the kernels of convolutions and products read them, and the map that they fill."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LINE = 128  # bytes of a line of a GPU's cache


def laid_out(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Channels side by side, and a residual without gaps; between the taps of a weight there may be gaps."""
    if x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    size = weight.shape[2]
    if weight.stride(1) != 1 or (size > 1 and weight.stride(2) != size * weight.stride(3)):
        weight = weight.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return x, weight, residual


def padded_to_lines(weight: Tensor, *, bytes_each: int) -> Tensor:
    """A weight (..., channels) with zeros behind the channels.

    Its channels then start with a line of the cache in a type of so many bytes: from there a GPU loads no line twice.
    """
    return F.pad(weight, (0, -weight.shape[-1] % (LINE // bytes_each)))


def new_map(batch: int, channels: int, height: int, width: int, *, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for a map, (batch, channels, height, width), channels-last, on the device of `like`.

    Not asked for by `memory_format`: PyTorch's compiler would fill that before a kernel does.
    """
    return torch.empty((batch, height, width, channels), dtype=dtype, device=like.device).permute(0, 3, 1, 2)


def empty_map(x: Tensor, weight: Tensor, stride: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for the result of a 3x3 convolution; of the type of x unless another is given."""
    batch, _, height, width = x.shape
    height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
    return new_map(batch, weight.shape[0], height, width, like=x, dtype=dtype or x.dtype)
