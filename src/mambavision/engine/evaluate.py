"""How right a network is on labelled pictures, prepared exactly as for prediction."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from mambavision.data import DataError
from mambavision.data.loader import BadPictures, EvaluationBatches, make_loader
from mambavision.data.pools import Pictures
from mambavision.engine.precision import autocast
from mambavision.inference.preprocess import build_transform
from mambavision.models.classifier import MambaVision


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        top1: share of pictures whose class is the likeliest, in percent.
        top5: share whose class is among the five likeliest (or all, for fewer classes), in percent.
        loss: mean cross-entropy, in nats.
        count: pictures evaluated.
        seconds: how long it took, reading the pictures included.
        per_class: top1 of each class, in percent; NaN for a class without pictures.
        bad: name and reason of each picture that could not be read and is left out.
    """

    top1: float
    top5: float
    loss: float
    count: int
    seconds: float
    per_class: tuple[float, ...]
    bad: BadPictures = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """Pictures evaluated a second, reading included."""
        return self.count / self.seconds


def evaluation_batches(
    pictures: Pictures, model: MambaVision, *, batch_size: int, workers: int, device: torch.device
) -> Iterable[tuple[Tensor, Tensor, BadPictures]]:
    """The pictures as the network's input, through the transform that prediction uses."""
    transform = build_transform(model.config.preprocessing, model.config.in_chans)
    batches = EvaluationBatches(pictures, transform, batch_size=batch_size)
    return make_loader(batches, range(len(batches)), workers=workers, pin_memory=device.type == "cuda")


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, BadPictures]],
    *,
    num_classes: int,
    device: torch.device,
    precision: str = "float32",
    channels_last: bool = False,
) -> Evaluation:
    """Evaluate `model` on `batches` of normalised pictures and labels; the device is waited for once, at the end.

    Args:
        model: the network on its device, uncompiled: then the last, smaller batch costs nothing extra.
        batches: pictures (n, C, H, W), labels (n,), unreadable pictures.
        num_classes: outputs of the network.
        device: where it runs.
        precision: type of autocast.
        channels_last: memory order of the pictures, and of the weights from then on.

    Raises:
        DataError: when not one picture can be read.
    """
    start = time.perf_counter()
    top1 = MulticlassAccuracy(num_classes, average="micro", validate_args=False).to(device)
    top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes), validate_args=False).to(device)
    per_class = MulticlassAccuracy(num_classes, average=None, validate_args=False).to(device)
    loss, count = torch.zeros((), device=device), 0
    seen = torch.zeros(num_classes, device=device)
    bad: BadPictures = []
    training = model.training
    model.eval()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    for pictures, labels, unreadable in batches:
        bad += unreadable
        if len(labels) == 0:
            continue
        pictures = pictures.to(
            device, non_blocking=True, memory_format=torch.channels_last if channels_last else torch.preserve_format
        )
        labels = labels.to(device, non_blocking=True)
        with autocast(device, precision):
            logits = model(pictures)
        logits = logits.float()
        for metric in (top1, top5, per_class):
            metric.update(logits, labels)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        seen += torch.bincount(labels, minlength=num_classes)
        count += len(labels)
    model.train(training)
    if count == 0:
        raise DataError(f"None of the {len(bad)} pictures can be read; the first: {bad[0][1]}")
    shares = torch.where(seen > 0, per_class.compute(), torch.nan)
    return Evaluation(
        top1=_percent(top1.compute()),
        top5=_percent(top5.compute()),
        loss=loss.item() / count,
        count=count,
        seconds=time.perf_counter() - start,
        per_class=tuple(_percent(share) for share in shares),
        bad=bad,
    )


def _percent(share: Tensor) -> float:
    return round(100 * share.item(), 4)  # float32 has no more true digits


def match_classes(pictures: Pictures, class_names: Sequence[str]) -> tuple[Pictures, str]:
    """The pictures with labels as the network numbers its outputs, and a sentence that says how they were matched.

    Args:
        pictures: labelled by their own class names.
        class_names: the network's.

    Raises:
        DataError: when the classes do not fit.
    """
    own, counts = pictures.class_names, Counter(class_names)
    known = {name: number for number, name in enumerate(class_names) if counts[name] == 1}  # others name no class
    if set(own) <= set(known):
        numbers = np.array([known[name] for name in own])
        matched = Pictures(pictures.pool, pictures.indices, numbers[pictures.labels], tuple(class_names))
        return matched, "Classes are matched by name."
    unknown = sorted(set(own) - set(known))
    if set(own) & set(known) or len(own) != len(class_names):
        raise DataError(
            f"The model does not know {len(unknown)} of the pictures' {len(own)} classes, such as "
            f"{', '.join(unknown[:3])}; it knows {len(class_names)}, such as {', '.join(class_names[:3])}."
        )
    matched = Pictures(pictures.pool, pictures.indices, pictures.labels, tuple(class_names))
    return matched, f"No class name is the model's, so they are matched in order: {own[0]} as {class_names[0]}, ..."
