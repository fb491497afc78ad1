"""What happens to a whole training batch on the device: normalising, random erasing, mixup and cutmix."""

from __future__ import annotations

import math

import torch
from timm.data import Mixup
from torch import Tensor

from mambavision.config import Preprocessing
from mambavision.data.config import AugmentConfig

ERASED_AREA = (0.02, 1 / 3)  # share of the picture
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10


class DeviceAugment:
    """Turns uint8 pictures and labels into what the network and the loss take, on one device.

    Args:
        augment: erasing and mixing.
        preprocessing: mean and standard deviation of the network's input.
        num_classes: width of mixed targets.
        smoothing: label smoothing of mixed targets.
        device: where it happens.
    """

    def __init__(
        self,
        augment: AugmentConfig,
        preprocessing: Preprocessing,
        *,
        num_classes: int,
        smoothing: float,
        device: torch.device,
    ) -> None:
        self._device = device
        self._erasing = augment.erasing
        self._mean = torch.tensor(preprocessing.mean, device=device).view(-1, 1, 1) * 255
        self._std = torch.tensor(preprocessing.std, device=device).view(-1, 1, 1) * 255
        self._mix = (
            Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.mix_switch_prob,
                mode=augment.mix_mode,
                label_smoothing=smoothing,
                num_classes=num_classes,
            )
            if augment.mixes
            else None
        )

    def __call__(self, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Network input and target.

        Args:
            pictures: uint8 (B, H, W, 3).
            labels: int64 (B,).

        Returns:
            Pictures, float32 (B, 3, H, W) in channels-last memory order; and labels as they are or, when mixing,
            the share of each class, float32 (B, classes).
        """
        pictures = pictures.to(self._device, non_blocking=True).permute(0, 3, 1, 2)  # (B, 3, H, W), channels last
        labels = labels.to(self._device, non_blocking=True)
        normalised = pictures.float().sub_(self._mean).div_(self._std)
        if self._erasing:
            normalised = erase(normalised, self._erasing)
        return (normalised, labels) if self._mix is None else self._mix(normalised, labels)


def erase(pictures: Tensor, probability: float) -> Tensor:
    """Random erasing (Zhong et al. 2017) with normal noise a pixel, as timm's RandomErasing in mode `pixel`.

    timm's is a loop over the pictures with several kernels each; this draws all rectangles at once.

    Args:
        pictures: normalised; (B, C, H, W).
        probability: of each picture to get one rectangle.
    """
    batch, _, height, width = pictures.shape
    shape = (batch, ERASING_ATTEMPTS)
    area = torch.empty(shape).uniform_(*ERASED_AREA) * (height * width)
    aspect = torch.empty(shape).uniform_(*map(math.log, ERASED_ASPECT)).exp()
    rows, columns = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # (B, attempts)
    fits = (rows < height) & (columns < width)
    first = fits.int().argmax(dim=1, keepdim=True)  # (B, 1)
    rows, columns = rows.gather(1, first), columns.gather(1, first)
    top = (torch.rand(batch, 1) * (height - rows + 1)).floor()
    left = (torch.rand(batch, 1) * (width - columns + 1)).floor()
    chosen = (torch.rand(batch, 1) < probability) & fits.any(dim=1, keepdim=True)
    rows = torch.where(chosen, rows, 0)
    box = torch.stack([top, top + rows, left, left + columns]).to(pictures.device, non_blocking=True)  # (4, B, 1)
    y = torch.arange(height, device=pictures.device)
    x = torch.arange(width, device=pictures.device)
    mask = ((y >= box[0]) & (y < box[1]))[:, None, :, None] & ((x >= box[2]) & (x < box[3]))[:, None, None, :]
    return torch.where(mask, torch.randn_like(pictures), pictures)
