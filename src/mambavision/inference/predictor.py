"""`Predictor`: a network with its own preprocessing and labels, over any number of pictures.

    from mambavision import Predictor

    for prediction in Predictor()(["cat.jpg"]):
        print(prediction)

A picture that cannot be read becomes a prediction with an error; the others are done.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mambavision.config import MambaVisionConfig
from mambavision.factory import create_model
from mambavision.inference.images import ImageError, Picture, picture_name, read_image
from mambavision.inference.preprocess import build_transform
from mambavision.models.classifier import MambaVision

PACKAGED_MODEL = "mamba_vision_nano_32"


class DeviceError(ValueError):
    """A device that this PyTorch does not know or this machine does not have."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The likeliest classes of one picture, best first, or why there are none.

    Attributes:
        source: the picture's path, or what it is called without one.
        labels: names of the classes.
        indices: their places among the network's outputs.
        probabilities: softmax over all classes, in 0..1.
        error: one sentence when the picture could not be classified; the other fields are empty then.
    """

    source: str
    labels: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None

    def __str__(self) -> str:
        if self.error is not None:
            return self.error
        classes = zip(self.labels, self.probabilities, strict=True)
        return f"{self.source}: " + ", ".join(f"{label} {probability:.1%}" for label, probability in classes)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One picture as the network takes it, or why there is none.

    Attributes:
        source: the picture's path, or what it is called without one.
        input: (in_chans, height, width), float32, normalised.
        error: one sentence when the picture could not be read.
    """

    source: str
    input: Tensor | None = None
    error: str | None = None


class Predictor:
    """Classify pictures with a network, the preprocessing its weights were measured with, and its class names.

    Args:
        model: a variant's name for its published weights, or a `MambaVision`, which is switched to evaluation mode.
            None takes the checkpoint's own, and without a checkpoint the small model that ships with the package.
        checkpoint: file with weights: a checkpoint of ours, or a public one together with the variant's name.
        device: `auto` for CUDA, else MPS, else the CPU (a `MambaVision` that is given stays where it is), or any
            name that `torch.device` takes.
        batch_size: pictures that go through the network at once.

    Attributes:
        model: the network.
        config: its configuration, preprocessing included.
        labels: name of each output.
        device: where it runs.

    Raises:
        UnknownVariantError: no such model; the message lists the nearest names.
        CheckpointError: weights that cannot be fetched, read or loaded.
        FileNotFoundError: no file at `checkpoint`.
        DeviceError: no such device here.
        TypeError: `model` is none of these.
        ValueError: a network without classes or for other than 1 or 3 channels, or a batch size below 1.
    """

    def __init__(
        self,
        model: str | MambaVision | None = None,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        device: str | torch.device = "auto",
        batch_size: int = 16,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if not isinstance(model, (str, MambaVision, type(None))):
            raise TypeError(f"model must be a name, a MambaVision classifier or None, got {type(model).__name__}.")
        if isinstance(model, MambaVision):
            if checkpoint is not None:
                raise ValueError("Give either a network or a checkpoint to read, not both.")
            self.device = next(model.parameters()).device if device == "auto" else find_device(device)
        else:
            self.device = find_device(device)
            model = _create(model, checkpoint)
        self.model = model.to(self.device).eval()
        self.config: MambaVisionConfig = model.config
        self.labels = class_labels(self.config)
        self.batch_size = batch_size
        self._transform = build_transform(self.config.preprocessing, self.config.in_chans)
        self._dtype = next(model.parameters()).dtype

    def __call__(self, pictures: Picture | Iterable[Picture], top_k: int = 5) -> list[Prediction]:
        """Classify one picture or several; a picture that cannot be read becomes a `Prediction` with its error.

        Args:
            pictures: paths, bytes or opened files of pictures, PIL images, or uint8 arrays (height, width, channels).
            top_k: classes a picture, all when there are fewer.

        Returns:
            One prediction a picture, in order.
        """
        return list(self.stream(pictures, top_k))

    def stream(self, pictures: Picture | Iterable[Picture], top_k: int = 5) -> Iterator[Prediction]:
        """As calling the predictor, but a batch at a time: for more pictures than fit into memory."""
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}.")
        return self._stream(pictures, min(top_k, len(self.labels)))

    def prepare(self, pictures: Picture | Iterable[Picture]) -> Iterator[list[Prepared]]:
        """Pictures as the network's inputs, a batch at a time; one that cannot be read comes with its error."""
        remaining = iter(_listed(pictures))
        first = 1
        while batch := list(itertools.islice(remaining, self.batch_size)):
            yield [self._prepare(picture, f"picture {first + place}") for place, picture in enumerate(batch)]
            first += len(batch)

    def to_network(self, inputs: Tensor) -> Tensor:
        """Inputs with the device and type of the network."""
        return inputs.to(device=self.device, dtype=self._dtype)

    def _stream(self, pictures: Picture | Iterable[Picture], top_k: int) -> Iterator[Prediction]:
        for batch in self.prepare(pictures):
            yield from self._classify(batch, top_k)

    def _prepare(self, picture: Picture, unnamed: str) -> Prepared:
        name = picture_name(picture) or unnamed
        try:
            return Prepared(source=name, input=self._transform(read_image(picture, name=name)))
        except ImageError as problem:
            return Prepared(source=name, error=str(problem))

    def _classify(self, batch: list[Prepared], top_k: int) -> Iterator[Prediction]:
        """Predictions for one batch, in order."""
        inputs = [prepared.input for prepared in batch if prepared.input is not None]
        ranked: Iterator[tuple[list[float], list[int]]] = iter(())
        if inputs:
            probabilities, indices = self._probabilities(torch.stack(inputs)).topk(top_k)
            ranked = zip(probabilities.tolist(), indices.tolist(), strict=True)
        for prepared in batch:
            if prepared.input is None:
                yield Prediction(source=prepared.source, error=prepared.error)
            else:
                yield self._prediction(prepared.source, *next(ranked))

    @torch.inference_mode()
    def _probabilities(self, inputs: Tensor) -> Tensor:
        """(batch, classes) in float32 on the CPU, of inputs (batch, channels, height, width)."""
        logits: Tensor = self.model(self.to_network(inputs))
        return logits.float().softmax(-1).cpu()

    def _prediction(self, source: str, probabilities: list[float], indices: list[int]) -> Prediction:
        if not np.isfinite(probabilities).all():
            return Prediction(source=source, error=f"{source}: the network's output is not finite.")
        labels = tuple(self.labels[index] for index in indices)
        return Prediction(source=source, labels=labels, indices=tuple(indices), probabilities=tuple(probabilities))


def class_labels(config: MambaVisionConfig) -> tuple[str, ...]:
    """Name of each output: the configuration's own, those of ImageNet-1K where there are 1000, else `class 0`, ...

    Raises:
        ValueError: the network has no classes.
    """
    if config.num_classes == 0:
        raise ValueError("The model has no classifier (num_classes is 0), so there is nothing to predict.")
    if config.class_names is not None:
        return config.class_names
    if config.num_classes == 1000:
        from torchvision.models import ResNet50_Weights  # here, because all of torchvision's models come with it

        return tuple(ResNet50_Weights.DEFAULT.meta["categories"])
    return tuple(f"class {index}" for index in range(config.num_classes))


def find_device(name: str | torch.device) -> torch.device:
    """The device called `name`; `auto` is CUDA, else MPS, else the CPU.

    Raises:
        DeviceError: this PyTorch does not know it or this machine does not have it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # PyTorch's answers to a device it lacks
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise DeviceError(f"Device {str(name)!r} cannot be used here ({reason}); try auto or cpu.") from error
    if device.type == "meta":
        raise DeviceError("Device 'meta' has shapes but no values; try auto or cpu.")
    return device


def _create(name: str | None, checkpoint: str | os.PathLike[str] | None) -> MambaVision:
    if checkpoint is not None:
        model = create_model(name, checkpoint_path=checkpoint)
    else:
        model = create_model(name or PACKAGED_MODEL, pretrained=True)
    assert isinstance(model, MambaVision)  # a backbone comes with features_only alone
    return model


def _listed(pictures: Picture | Iterable[Picture]) -> Iterable[Picture]:
    """`pictures`, or a list of the one picture that was given."""
    if isinstance(pictures, np.ndarray):
        return list(pictures) if pictures.ndim > 3 else [pictures]
    if isinstance(pictures, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)) or hasattr(pictures, "read"):
        return [cast("Picture", pictures)]
    return pictures
