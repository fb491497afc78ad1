"""Image processors: the evaluation transform in transformers' terms, by Pillow and by torchvision.

Pillow's gives the pixels that the published accuracies were measured with; torchvision's is faster, runs on a GPU too,
and rounds otherwise when it resizes: by up to two of 255 grey levels. transformers 5 calls them backends and prefers
torchvision's, 4 calls them slow and fast and prefers Pillow's; `MambaVisionImageProcessor` is the preferred one.
"""

from __future__ import annotations

import math
import os
from typing import Any

from transformers import PretrainedConfig
from transformers.image_utils import ChannelDimension, PILImageResampling

from mambavision.config import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from mambavision.integrations.huggingface.configuration import MambaVisionConfig

try:
    from transformers.image_processing_backends import PilBackend, TorchvisionBackend

    PLAIN_NAME_IS = "torchvision"
except ImportError:  # transformers 4
    from transformers import CLIPImageProcessor as PilBackend
    from transformers.image_processing_utils_fast import BaseImageProcessorFast as TorchvisionBackend

    PLAIN_NAME_IS = "pil"


def processor_fields(preprocessing: Preprocessing) -> dict[str, Any]:
    """Settings of an image processor that prepares pictures as `preprocessing` says.

    Raises:
        ValueError: for a crop from the centre that is not square; transformers resizes by the shorter side alone.
    """
    height, width = preprocessing.img_size
    resized = {
        "height": math.floor(height / preprocessing.crop_pct),
        "width": math.floor(width / preprocessing.crop_pct),
    }
    if preprocessing.crop_mode == "center":
        if height != width:
            raise ValueError(
                f"No image processor crops {height} x {width} px from the centre as the network expects; "
                f'use crop_mode "squash", or give an image processor the size and crop_size that you want.'
            )
        resized = {"shortest_edge": resized["height"]}
    return {
        "size": resized,
        "crop_size": {"height": height, "width": width},
        "resample": int(PILImageResampling[preprocessing.interpolation.upper()]),
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


class _EvaluationTransform:
    """What both have in common: defaults, where the crop lies, and settings from the model's own configuration."""

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
        """The processor that belongs to a model; `kwargs` as for the constructor.

        Raises:
            ValueError: see `processor_fields`.
        """
        return cls(**{**processor_fields(config.network_config().preprocessing), **kwargs})

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
            return processor_fields(MambaVisionConfig.from_dict(fields).network_config().preprocessing), unused

    def center_crop(self, image: Any, size: Any, **kwargs: Any) -> Any:
        """Cut out the centre, where it is not between two pixels as torchvision does it: the even one of the two.

        Args:
            image: array or tensor, (..., channels, height, width), or channels last when `input_data_format` says so.
            size: mapping with `height` and `width`.
            **kwargs: what the base class takes.
        """
        channels_last = kwargs.get("input_data_format") == ChannelDimension.LAST
        height, width = image.shape[:2] if channels_last else image.shape[-2:]
        if height < size["height"] or width < size["width"]:
            return super().center_crop(image, size, **kwargs)  # type: ignore[misc]  # pads
        top, left = round((height - size["height"]) / 2), round((width - size["width"]) / 2)
        rows, columns = slice(top, top + size["height"]), slice(left, left + size["width"])
        return image[rows, columns] if channels_last else image[..., rows, columns]


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
