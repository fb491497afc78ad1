"""Cutting a feature map into square windows of tokens and putting it back (paper, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_partition(x: Tensor, size: int) -> Tensor:
    """Cut a map into windows, zero-padded on the right and at the bottom to whole windows.

    Args:
        x: feature map, (batch, channels, H, W).
        size: side of a window in tokens.

    Returns:
        (batch * windows, size * size, channels), windows and their tokens in row-major order.
    """
    batch, channels, height, width = x.shape
    rows, columns = _whole_windows(height, size), _whole_windows(width, size)
    if rows * size != height or columns * size != width:
        x = F.pad(x, (0, columns * size - width, 0, rows * size - height))
    x = x.permute(0, 2, 3, 1).reshape(batch, rows, size, columns, size, channels)
    x = x.transpose(2, 3)  # (batch, rows, columns, size, size, channels)
    return x.reshape(batch * rows * columns, size * size, channels)


def window_reverse(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of `window_partition`, padding cropped.

    Args:
        windows: (batch * windows, size * size, channels).
        size: side of a window in tokens.
        height: rows of the map, H.
        width: columns of the map, W.

    Returns:
        (batch, channels, H, W), channels-last in memory.
    """
    rows, columns = _whole_windows(height, size), _whole_windows(width, size)
    channels = windows.shape[-1]
    x = windows.reshape(windows.shape[0] // (rows * columns), rows, columns, size, size, channels)
    x = x.transpose(2, 3)  # (batch, rows, size, columns, size, channels)
    x = x.reshape(x.shape[0], rows * size, columns * size, channels).permute(0, 3, 1, 2)
    return x[:, :, :height, :width].contiguous(memory_format=torch.channels_last)  # of a map without padding, itself


def _whole_windows(length: int, size: int) -> int:
    return (length + size - 1) // size  # not -(-length // size): ONNX rounds a negative quotient towards zero
