"""How one training picture is varied on the CPU: timm's transforms and a crop for small pictures; PIL in, PIL out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize
from torchvision.transforms import Compose, RandomHorizontalFlip, Resize

from mambavision.config import Preprocessing
from mambavision.data.config import AugmentConfig

PictureTransform = Callable[[Image.Image], Image.Image]


def build_train_transform(augment: AugmentConfig, preprocessing: Preprocessing) -> PictureTransform:
    """The random transform of one picture, drawing from the global generators of random, NumPy and torch.

    Normalising, erasing and mixing follow on the device, a batch at a time: see `DeviceAugment`.

    Args:
        augment: what is done.
        preprocessing: of the network; gives the size and, to the colour policies, the mean.

    Raises:
        ValueError: timm does not know the policy `auto_augment`.
    """
    size = preprocessing.img_size
    try:
        crop, policy, _ = create_transform(
            size,
            is_training=True,
            use_prefetcher=True,
            separate=True,  # the third part would make a normalised tensor
            scale=augment.scale,
            ratio=augment.ratio,
            interpolation=augment.interpolation,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]  # None is how timm leaves it out
            auto_augment=augment.auto_augment,
            mean=preprocessing.mean,
            std=preprocessing.std,
        )
    except (AssertionError, KeyError, IndexError) as error:  # timm's answers to a policy that it does not know
        raise ValueError(
            f"auto_augment {augment.auto_augment!r} is not a policy that timm knows; "
            f"try rand-m9-mstd0.5-inc1, or null for none."
        ) from error
    if augment.crop == "pad":
        # Resize leaves a picture of that size as it is.
        crop = Compose([Resize(min(size)), RandomPadCrop(size, augment.pad), RandomHorizontalFlip(augment.hflip)])
    for op in _policy_ops(policy.transforms):
        if op.aug_fn is posterize:
            op.aug_fn = _posterize
    return Compose([*crop.transforms, *policy.transforms])


class RandomPadCrop:
    """Pads a picture with black by `pad` pixels on each side and cuts out `size` (height, width) at random."""

    def __init__(self, size: tuple[int, int], pad: int) -> None:
        self.size = size
        self.pad = pad

    def __call__(self, picture: Image.Image) -> Image.Image:
        """The cut-out."""
        height, width = self.size
        left = random.randint(-self.pad, max(picture.width - width, 0) + self.pad)
        top = random.randint(-self.pad, max(picture.height - height, 0) + self.pad)
        return picture.crop((left, top, left + width, top + height))  # black beyond the border


def _policy_ops(part: Any) -> Iterator[AugmentOp]:
    """Every operation in timm's policies, which keep them in `ops` (RandAugment, AugMix) or `policy` (AutoAugment)."""
    if isinstance(part, AugmentOp):
        yield part
    elif isinstance(part, (list, tuple)):
        for entry in part:
            yield from _policy_ops(entry)
    else:
        yield from _policy_ops(getattr(part, "ops", getattr(part, "policy", ())))


def _posterize(picture: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """Posterize, which at timm's strongest would keep 0 bits; Pillow 13 refuses that, and no picture would be left."""
    return posterize(picture, max(bits, 1), **kwargs)
