"""From a picture to the network's input: the evaluation transform of timm's `create_transform`, on torchvision alone.

Equal to it to the last bit, since accuracy was measured with it; tests compare the two for every public variant.
"""

from __future__ import annotations

import math

from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Grayscale, InterpolationMode, Normalize, Resize, ToTensor
from torchvision.transforms import functional as F

from mambavision.config import Preprocessing

# A picture of one pixel's width scales to gigabytes: beyond so many resized pixels its ends are cut off beforehand.
MAX_RESIZED_PIXELS = 2**26


def build_transform(preprocessing: Preprocessing, in_chans: int = 3) -> Compose:
    """Transform from an RGB picture to a float32 tensor (in_chans, height, width).

    A network with one input channel gets the picture's luma, normalised with the averages of the means and of the
    standard deviations: the counterpart of a first convolution summed over its three channels.

    Args:
        preprocessing: size, crop and normalisation, as the weights' configuration carries them.
        in_chans: channels of the network's input, 3 or 1.

    Raises:
        ValueError: for another number of channels, which a photograph does not have.
    """
    if in_chans not in (1, 3):
        raise ValueError(f"The model takes {in_chans} channels and pictures have 1 or 3; call it on tensors instead.")
    height, width = preprocessing.img_size
    target = preprocessing.resize_size
    interpolation = InterpolationMode(preprocessing.interpolation)
    if preprocessing.crop_mode == "squash":
        resize = [Resize(target, interpolation)]
    elif target[0] == target[1]:
        resize = [TrimEnds(target[0]), Resize(target[0], interpolation)]
    else:
        resize = [TrimEnds(max(target)), ResizeToCover(target, interpolation)]
    return Compose(
        [
            *([Grayscale()] if in_chans == 1 else []),
            *resize,
            CenterCrop((height, width)),
            ToTensor(),
            Normalize(*preprocessing.statistics(in_chans)),
        ]
    )


class ResizeToCover:
    """Resize, keeping the aspect ratio, to the smallest picture that covers `size` (height, width)."""

    def __init__(self, size: tuple[int, int], interpolation: InterpolationMode) -> None:
        self.size = size
        self.interpolation = interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        ratio = min(image.height / self.size[0], image.width / self.size[1])
        covering = [round(image.height / ratio), round(image.width / ratio)]
        resized: Image.Image = F.resize(image, covering, self.interpolation)
        return resized


class TrimEnds:
    """Cut the ends off a picture that would have over `MAX_RESIZED_PIXELS` with its shorter side resized to `side`."""

    def __init__(self, side: int) -> None:
        self.longest = MAX_RESIZED_PIXELS / side**2  # over the shorter side

    def __call__(self, image: Image.Image) -> Image.Image:
        short, long = sorted(image.size)
        cut = (long - math.ceil(short * self.longest)) // 2
        if cut <= 0:
            return image
        if image.width > image.height:
            return image.crop((cut, 0, image.width - cut, image.height))
        return image.crop((0, cut, image.width, image.height - cut))
