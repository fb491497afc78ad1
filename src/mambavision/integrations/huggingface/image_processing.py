"""Image processors: the evaluation transform in transformers' terms, by Pillow and by torchvision.

Pillow's gives the pixels that the published accuracies were measured with; torchvision's is faster, runs on a GPU too,
and rounds otherwise when it resizes: by up to two of 255 grey levels. transformers 5 calls them backends and prefers
torchvision's, 4 calls them slow and fast and prefers Pillow's; `MambaVisionImageProcessor` is the preferred one.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import PretrainedConfig
from transformers.image_utils import ChannelDimension, PILImageResampling, is_pil_image, to_numpy_array

from mambavision.config import IMAGENET_MEAN, IMAGENET_STD
from mambavision.integrations.huggingface.configuration import MambaVisionConfig

try:
    from transformers.image_processing_backends import PilBackend, TorchvisionBackend

    PLAIN_NAME_IS = "torchvision"
except ImportError:  # transformers 4
    from transformers import CLIPImageProcessor as PilBackend
    from transformers.image_processing_utils_fast import BaseImageProcessorFast as TorchvisionBackend

    PLAIN_NAME_IS = "pil"


def processor_fields(config: MambaVisionConfig) -> dict[str, Any]:
    """Settings of an image processor that prepares pictures as a model's configuration says."""
    preprocessing = config.network_config().preprocessing
    height, width = preprocessing.img_size
    resized = dict(zip(("height", "width"), preprocessing.resize_size, strict=True))
    covers = preprocessing.crop_mode == "center" and height != width
    if preprocessing.crop_mode == "center" and not covers:
        resized = {"shortest_edge": resized["height"]}
    mean, std = preprocessing.statistics(config.num_channels)
    return {
        "size": resized,
        "resize_to_cover": covers,
        "crop_size": {"height": height, "width": width},
        "resample": int(PILImageResampling[preprocessing.interpolation.upper()]),
        "image_mean": list(mean),
        "image_std": list(std),
        "do_convert_rgb": config.num_channels == 3,
    }


class _EvaluationTransform:
    """What both have in common: defaults, where the crop lies, and settings from the model's own configuration.

    With `resize_to_cover`, pictures keep their aspect ratio and cover `size` (height, width). Where one channel is
    normalised, pictures are turned to grey.
    """

    resize_to_cover = False
    resample = PILImageResampling.BICUBIC
    size = {"shortest_edge": 224}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    image_mean = IMAGENET_MEAN
    image_std = IMAGENET_STD
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs: Any) -> None:
        defaults = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
        super().__init__(**{**defaults, **kwargs})

    @classmethod
    def from_model_config(cls, config: MambaVisionConfig, **kwargs: Any) -> Any:
        """The processor that belongs to a model; `kwargs` as for the constructor."""
        return cls(**{**processor_fields(config), **kwargs})

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings from the repository's `preprocessor_config.json` or, as the public ones have none, `config.json`."""
        try:
            return super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        except OSError:
            kwargs.pop("image_processor_filename", None)
            fields, unused = PretrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
            if fields.get("model_type") != MambaVisionConfig.model_type:
                raise
            return processor_fields(MambaVisionConfig.from_dict(fields)), unused

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Pictures of addresses, as the base class gets them; grey for networks of one channel."""
        found = super().fetch_images(image_url_or_urls)  # type: ignore[misc]
        if len(self.image_mean) == 1 and is_pil_image(found):
            return to_numpy_array(found.convert("L"))[..., None]  # (height, width, 1)
        return found

    def resize(self, image: Any, size: Any, **kwargs: Any) -> Any:
        """Resize to `size`, or to the smallest picture that covers it; arguments as for `center_crop`."""
        if self.resize_to_cover:
            height, width = _extent(image, kwargs)
            ratio = min(height / size["height"], width / size["width"])
            size = type(size)(height=round(height / ratio), width=round(width / ratio))
        return super().resize(image, size, **kwargs)  # type: ignore[misc]

    def center_crop(self, image: Any, size: Any, **kwargs: Any) -> Any:
        """Cut out the centre, where it is not between two pixels as torchvision does it: the even one of the two.

        Args:
            image: array or tensor, (..., channels, height, width), or channels last when `input_data_format` says so.
            size: mapping with `height` and `width`.
            **kwargs: what the base class takes.
        """
        height, width = _extent(image, kwargs)
        if height < size["height"] or width < size["width"]:
            return super().center_crop(image, size, **kwargs)  # type: ignore[misc]  # pads
        top, left = round((height - size["height"]) / 2), round((width - size["width"]) / 2)
        rows, columns = slice(top, top + size["height"]), slice(left, left + size["width"])
        return image[rows, columns] if _channels_last(kwargs) else image[..., rows, columns]


def _channels_last(options: dict[str, Any]) -> bool:
    return options.get("input_data_format") == ChannelDimension.LAST


def _extent(image: Any, options: dict[str, Any]) -> tuple[int, int]:
    """Height and width of an array or tensor."""
    height, width = image.shape[:2] if _channels_last(options) else image.shape[-2:]
    return height, width


if PLAIN_NAME_IS == "torchvision":

    class MambaVisionImageProcessor(_EvaluationTransform, TorchvisionBackend):
        """The evaluation transform by torchvision, on tensors of any device."""

    class MambaVisionImageProcessorPil(_EvaluationTransform, PilBackend):
        """The evaluation transform by Pillow, equal to `Predictor`'s."""

    IMAGE_PROCESSORS = {"pil": MambaVisionImageProcessorPil, "torchvision": MambaVisionImageProcessor}
else:

    class MambaVisionImageProcessor(_EvaluationTransform, PilBackend):  # type: ignore[no-redef]
        """The evaluation transform by Pillow, equal to `Predictor`'s."""

    class MambaVisionImageProcessorFast(_EvaluationTransform, TorchvisionBackend):
        """The evaluation transform by torchvision, on tensors of any device."""

        slow_image_processor_class = MambaVisionImageProcessor  # AutoImageProcessor.register asks for it

    IMAGE_PROCESSORS = {"pil": MambaVisionImageProcessor, "torchvision": MambaVisionImageProcessorFast}
