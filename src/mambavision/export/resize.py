"""Resizing and cropping as a graph's own operations, with Pillow's pixels.

Pillow's antialiased filters are two products with banded matrices, whose entries follow from the sizes; so a graph of
standard operations holds them for pictures of any size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mambavision.config import Interpolation, Preprocessing


class ResizeAndCrop(nn.Module):
    """Decoded pictures of one size, whatever it is, resized to the network's and cropped.

    The evaluation transform (`inference.preprocess.build_transform`) without its normalisation, within two grey levels
    and for most pixels equal: Pillow rounds between the two directions, and which comes first depends on its version.

    Args:
        preprocessing: size, crop and filter.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.size = preprocessing.img_size
        self.target = preprocessing.resize_size
        self.squashes = preprocessing.crop_mode == "squash"
        self.interpolation = preprocessing.interpolation

    def forward(self, x: Tensor) -> Tensor:  # uint8, (batch, H, W, channels) -> (batch, *size, channels)
        sides = [torch.ones_like(x[0, :, 0, 0]).sum(), torch.ones_like(x[0, 0, :, 0]).sum()]  # as tensors, int64
        resized = self._resized(sides[0], sides[1])
        rows, columns = (
            self._weights(x.shape[place + 1], sides[place], resized[place], self.size[place]) for place in (0, 1)
        )
        y = x.permute(0, 3, 1, 2).float()  # (batch, channels, H, W)
        y = (y @ columns.t() + 0.5).floor().clamp(0, 255)  # Pillow, too, keeps whole levels between the two
        y = (rows @ y + 0.5).floor().clamp(0, 255)
        return y.to(torch.uint8).permute(0, 2, 3, 1)

    def _resized(self, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Height and width before the crop, int64."""
        rows, columns = self.target
        if self.squashes:
            return torch.full_like(height, rows), torch.full_like(width, columns)
        if rows == columns:
            shorter = torch.minimum(height, width)
            return rows * height // shorter, rows * width // shorter
        ratio = torch.minimum(height / rows, width / columns)
        return (height / ratio).round().long(), (width / ratio).round().long()

    def _weights(self, count: int, length: Tensor, resized: Tensor, size: int) -> Tensor:
        """What each of the `size` pixels behind the crop takes of each of `count` before, (size, count)."""
        scale = length.float() / resized.float()
        first = ((resized - size).float() / 2).round()
        centres = (torch.arange(size) + first + 0.5) * scale
        distance = (torch.arange(count) + 0.5 - centres[:, None]) / scale.clamp(min=1.0)
        weights = _FILTERS[self.interpolation](distance.abs())
        return weights / weights.sum(1, keepdim=True)


def _bilinear(distance: Tensor) -> Tensor:
    return (1 - distance).clamp(min=0)


def _bicubic(distance: Tensor) -> Tensor:
    """Keys' cubic with a = -1/2 (1981, equation 15)."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))


_FILTERS: dict[Interpolation, Callable[[Tensor], Tensor]] = {"bicubic": _bicubic, "bilinear": _bilinear}
