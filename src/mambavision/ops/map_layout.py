"""Maps and weights as the kernels of convolutions and products read them, and the map that they fill."""

from __future__ import annotations

import torch
from torch import Tensor


def laid_out(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Channels side by side, and a residual without gaps; between the rows of a weight there may be gaps."""
    if x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    channels, size = weight.shape[1:3]
    if weight.stride()[1] != 1 or (size > 1 and weight.stride()[2:] != (size * channels, channels)):
        weight = weight.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return x, weight, residual


def empty_map(x: Tensor, weight: Tensor, stride: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for the result, channels-last; of the type of x unless another is given."""
    shape = (x.shape[0], weight.shape[0], (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)
