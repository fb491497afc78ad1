"""Pictures as a graph's input: the sample photographs to compare on, and those that int8 is calibrated on."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mambavision.export.graph import normalization
from mambavision.inference.images import ImageError, Picture, read_image
from mambavision.inference.picture_files import find_pictures, sample_pictures
from mambavision.inference.preprocess import build_transform
from mambavision.models.backbone import MambaVisionBackbone

Calibration: TypeAlias = "str | os.PathLike[str] | Iterable[Picture]"

MOST_PICTURES = 256  # that int8 is calibrated on
_logger = logging.getLogger("mambavision")
_CROP = 3 / 4  # of each side of a sample photograph


def photographs(model: MambaVisionBackbone) -> Tensor:
    """The sample photographs as the model takes them, (photographs, in_chans, height, width), normalised."""
    return _normalised(model, [read_image(path) for path in sample_pictures()])


def decoded_photographs(model: MambaVisionBackbone) -> list[tuple[Tensor, Tensor]]:
    """(as the model takes it, as decoded: uint8, (1, H, W, in_chans)) of each sample photograph."""
    pairs = []
    for path in sample_pictures():
        picture = read_image(path)
        pixels = torch.from_numpy(np.array(picture if model.config.in_chans == 3 else picture.convert("L")))
        pairs.append((_normalised(model, [picture]), pixels.reshape(1, picture.height, picture.width, -1)))
    return pairs


def as_input(model: MambaVisionBackbone, normalised: Tensor, *, uint8: bool) -> Tensor:
    """Normalised pictures (batch, in_chans, height, width) as a graph takes them."""
    if not uint8:
        return normalised.contiguous()
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (normalization(model).mean, normalization(model).std))
    return ((normalised * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def calibration_batches(
    model: MambaVisionBackbone, calibration: Calibration | None, *, uint8: bool, batch_size: int = 1
) -> list[Tensor]:
    """Inputs to find the ranges of activations with, each of `batch_size` pictures.

    Args:
        model: tells the preprocessing.
        calibration: a folder that is searched with all its subfolders, or pictures; at most `MOST_PICTURES` are taken,
            evenly spaced. None takes the sample photographs, whole and in four corners, each mirrored too.
        uint8: as the graph.
        batch_size: pictures a batch; the last one is filled with the first pictures.

    Raises:
        ValueError: there are no pictures, or none that can be read; those that cannot are named in the log.
    """
    if calibration is None:
        pictures = [view for path in sample_pictures() for view in _views(read_image(path))]
    else:
        named: list[Picture]
        if isinstance(calibration, (str, os.PathLike)):
            named, problems = find_pictures([os.fspath(calibration)])  # type: ignore[assignment]  # a path is a Picture
            if problems:
                raise ValueError(problems[0])
        else:
            named = list(calibration)
        if not named:
            raise ValueError("There are no pictures to calibrate with.")
        taken = min(len(named), MOST_PICTURES)
        pictures = _readable([named[place * len(named) // taken] for place in range(taken)])
    inputs = as_input(model, _normalised(model, pictures), uint8=uint8)
    return in_batches(inputs, batch_size)


def in_batches(pictures: Tensor, batch_size: int) -> list[Tensor]:
    """Pictures in batches of one size; the last one is filled with the first pictures."""
    batches = -(-len(pictures) // batch_size)
    return list(pictures[torch.arange(batches * batch_size) % len(pictures)].split(batch_size))


def describe_calibration(calibration: Calibration | None, batches: list[Tensor]) -> str:
    """In a few words, what was calibrated with."""
    if calibration is None:
        return "the sample photographs, whole, in their corners and mirrored"
    count = sum(map(len, batches))
    return f"{count} pictures" + (
        f" of {os.fspath(calibration)}" if isinstance(calibration, (str, os.PathLike)) else ""
    )


def _normalised(model: MambaVisionBackbone, pictures: list[Image.Image]) -> Tensor:
    transform = build_transform(model.config.preprocessing, model.config.in_chans)
    return torch.stack([transform(picture) for picture in pictures])


def _readable(pictures: list[Picture]) -> list[Image.Image]:
    read: list[Image.Image] = []
    for picture in pictures:
        try:
            read.append(read_image(picture))
        except ImageError as error:
            _logger.warning("Left out of the calibration: %s", error)
    if not read:
        raise ValueError("None of the pictures to calibrate with can be read.")
    return read


def _views(picture: Image.Image) -> list[Image.Image]:
    width, height = round(_CROP * picture.width), round(_CROP * picture.height)
    corners = itertools.product((0, picture.width - width), (0, picture.height - height))
    views = [picture, *(picture.crop((left, top, left + width, top + height)) for left, top in corners)]
    return [*views, *map(ImageOps.mirror, views)]
