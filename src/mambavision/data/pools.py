"""Where pictures come from: a list of files, or one block of bytes in memory; and a choice of them with class names."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from mambavision.inference.images import ImageError, printable, read_image


class Pool(Protocol):
    """Pictures by number."""

    def name(self, index: int) -> str:
        """What to call picture `index` in a message."""

    def read(self, index: int) -> Image.Image:
        """Picture `index` as RGB; ImageError when it cannot be read."""


class FilePool:
    """Picture files, read each time they are asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        # One array of bytes: a list of a million Path objects would be copied page by page into every worker.
        self._paths = np.array([os.fsencode(path) for path in paths])

    def name(self, index: int) -> str:
        """The file's path, as it can be shown."""
        return printable(os.fsdecode(self._paths[index]))

    def read(self, index: int) -> Image.Image:
        """The file's picture as RGB, upright; ImageError when it cannot be read."""
        return read_image(os.fsdecode(self._paths[index]))


class PackedPool:
    """Decoded pictures of any size behind each other in one block of bytes that all worker processes share.

    Args:
        pixels: bytes of all pictures, each (height, width, 3); uint8, flat.
        sizes: height and width of each picture; (N, 2).
        names: what to call each in a message.
    """

    def __init__(self, pixels: np.ndarray, sizes: np.ndarray, names: Sequence[str]) -> None:
        self._pixels = torch.from_numpy(pixels)
        if multiprocessing.get_start_method() != "fork":
            self._pixels.share_memory_()  # forked workers see the parent's pages; others would get a copy each
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._ends = np.cumsum(self._sizes.prod(axis=1) * 3)
        self._names = np.array([name.encode() for name in names])

    def name(self, index: int) -> str:
        """The picture's name."""
        return self._names[index].decode()

    def read(self, index: int) -> Image.Image:
        """The picture as RGB."""
        height, width = self._sizes[index].tolist()
        end = int(self._ends[index])
        start = end - height * width * 3
        # frombuffer would keep a read-only view; frombytes copies 3 kB for 32 px and is as fast.
        return Image.frombytes("RGB", (width, height), self._pixels[start:end].numpy())


@dataclass(frozen=True)
class Pictures:
    """A choice of a pool's pictures, with their classes.

    Attributes:
        pool: where they are.
        indices: which of the pool; int64 (N,).
        labels: class of each; int64 (N,), numbers into `class_names`.
        class_names: name of each class.
    """

    pool: Pool
    indices: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """What to call picture `index` in a message."""
        return self.pool.name(int(self.indices[index]))

    def read(self, index: int) -> Image.Image:
        """Picture `index` as RGB; ImageError when it cannot be read."""
        return self.pool.read(int(self.indices[index]))

    def take(self, which: np.ndarray) -> Pictures:
        """The pictures numbered `which`, in that order."""
        return dataclasses.replace(self, indices=self.indices[which], labels=self.labels[which])


def cache(pictures: Pictures, threads: int) -> tuple[Pictures, dict[str, str]]:
    """Decode every picture once into one block of memory.

    Returns:
        The readable pictures, and the reason by name for each that is not.
    """
    if isinstance(pictures.pool, PackedPool):
        return pictures, {}

    def decode(index: int) -> np.ndarray | ImageError:
        try:
            return np.asarray(pictures.read(index))
        except ImageError as error:
            return error

    with ThreadPoolExecutor(max(1, threads)) as pool:
        decoded = list(pool.map(decode, range(len(pictures))))
    good = np.array([index for index, entry in enumerate(decoded) if isinstance(entry, np.ndarray)], dtype=np.int64)
    bad = {pictures.name(index): str(entry) for index, entry in enumerate(decoded) if isinstance(entry, ImageError)}
    arrays = [decoded[index] for index in good]
    packed = PackedPool(
        np.concatenate([array.reshape(-1) for array in arrays]) if arrays else np.zeros(0, dtype=np.uint8),
        np.array([array.shape[:2] for array in arrays]).reshape(-1, 2),
        [pictures.name(index) for index in good],
    )
    kept = dataclasses.replace(pictures, pool=packed, indices=np.arange(len(good)), labels=pictures.labels[good])
    return kept, bad
