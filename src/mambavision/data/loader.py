"""Batches for training and evaluation, made by worker processes; the n-th batch is a function of the seed and of n."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mambavision.data import DataError
from mambavision.data.pools import Pictures
from mambavision.data.seeds import Stream, generator, seed_globals
from mambavision.inference.images import ImageError

BadPictures = list[tuple[str, str]]
"""Name of each unreadable picture and why it is unreadable."""


class TrainBatches(Dataset[tuple[Tensor, Tensor, BadPictures]]):
    """Training batches of all epochs behind each other; item n belongs to epoch n // `per_epoch`.

    An item is the pictures, uint8 (batch, H, W, 3), their labels, int64 (batch,), and which were unreadable: each of
    those is replaced by the next readable picture of the epoch's order, so that every batch is full.

    Args:
        pictures: what to train on.
        transform: varies a picture and gives it the network's size.
        batch_size: pictures in a batch.
        batches_per_step: batches that make one step; an epoch holds whole steps, the rest is left out of it.
        seed: of the order of the pictures and of the transform.

    Raises:
        DataError: when the pictures do not fill one step.
    """

    def __init__(
        self,
        pictures: Pictures,
        transform: Callable[[Image.Image], Image.Image],
        *,
        batch_size: int,
        batches_per_step: int = 1,
        seed: int = 0,
    ) -> None:
        self._pictures = pictures
        self._transform = transform
        self._batch_size = batch_size
        self._seed = seed
        self.steps_per_epoch = len(pictures) // (batch_size * batches_per_step)
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{len(pictures)} training pictures do not fill one step of {batch_size * batches_per_step}; "
                "choose a smaller --batch-size."
            )
        self.per_epoch = self.steps_per_epoch * batches_per_step
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, BadPictures]:
        epoch, batch = divmod(position, self.per_epoch)
        order = self._epoch_order(epoch)
        seed_globals(self._seed, Stream.PICTURES, position)
        bad: BadPictures = []
        pictures, labels = [], []
        for slot in range(batch * self._batch_size, (batch + 1) * self._batch_size):
            index, picture = self._first_readable(order, slot, bad)
            pictures.append(np.asarray(self._transform(picture)))
            labels.append(self._pictures.labels[index])
        return torch.from_numpy(np.stack(pictures)), torch.from_numpy(np.array(labels)), bad

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, generator(self._seed, Stream.ORDER, epoch).permutation(len(self._pictures))
        return self._order[1]

    def _first_readable(self, order: np.ndarray, slot: int, bad: BadPictures) -> tuple[int, Image.Image]:
        for offset in range(len(order)):
            index = int(order[(slot + offset) % len(order)])
            try:
                return index, self._pictures.read(index)
            except ImageError as error:
                bad.append((self._pictures.name(index), str(error)))
        raise DataError(f"None of the {len(order)} training pictures can be read; the first: {bad[0][1]}")


class EvaluationBatches(Dataset[tuple[Tensor, Tensor, BadPictures]]):
    """Batches of every picture once, in order; item n starts at picture n * `batch_size`.

    An item is the normalised pictures, float32 (n, C, H, W), their labels, int64 (n,), and which were unreadable and
    so are left out; n is at most `batch_size` and may be 0.
    """

    def __init__(self, pictures: Pictures, transform: Callable[[Image.Image], Tensor], *, batch_size: int) -> None:
        self._pictures = pictures
        self._transform = transform
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._pictures) // self._batch_size)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, BadPictures]:
        start = number * self._batch_size
        bad: BadPictures = []
        pictures, labels = [], []
        for index in range(start, min(start + self._batch_size, len(self._pictures))):
            try:
                pictures.append(self._transform(self._pictures.read(index)))
                labels.append(self._pictures.labels[index])
            except ImageError as error:
                bad.append((self._pictures.name(index), str(error)))
        stacked = torch.stack(pictures) if pictures else torch.zeros(0)
        return stacked, torch.tensor(np.array(labels, dtype=np.int64)), bad


def make_loader(
    batches: TrainBatches | EvaluationBatches, positions: Iterable[int], *, workers: int, pin_memory: bool
) -> DataLoader[tuple[Tensor, Tensor, BadPictures]]:
    """The batches at `positions`, in that order, made by `workers` processes (one a core at most) ahead of their use.

    One loader runs through all epochs, so that the workers never idle between two of them.
    """
    return DataLoader(
        batches,
        batch_size=None,  # an item is a batch already
        sampler=positions,
        num_workers=min(workers, os.cpu_count() or 1),
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )
