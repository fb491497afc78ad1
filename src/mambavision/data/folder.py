"""Which pictures lie in a folder: train/CLASS/PICTURE, CLASS/PICTURE, or train.npz; and how they are split."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mambavision.data import DataError
from mambavision.data.pools import FilePool, PackedPool, Pictures
from mambavision.inference.picture_files import walk_pictures

TRAIN_NAMES = ("train",)
EVALUATION_NAMES = ("val", "validation", "test")


def open_training(
    folder: str | Path,
    *,
    val_split: float = 0.0,
    split_seed: int = 0,
    limit_train: int | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[Pictures, Pictures]:
    """Training and evaluation pictures of a data folder; the classes are those of the training pictures.

    Args:
        folder: holds train and val (or test, validation), each a folder of classes or a .npz; or classes alone.
        val_split: share of the training pictures to evaluate on instead of the folder's own.
        split_seed: decides which; the same for every run that shall share a split.
        limit_train: keep so many training pictures only, a random choice by `split_seed`.
        class_names: names for a .npz without any.

    Raises:
        DataError: when the pictures are not there or their classes do not fit.
    """
    folder = Path(folder)
    source = _find(folder, TRAIN_NAMES)
    if source is None and val_split == 0:
        raise DataError(f"{folder} has no train folder or train.npz; to split {folder} itself, give --val-split 0.1.")
    train = open_pictures(source or folder, class_names=class_names)
    rng = np.random.default_rng(split_seed)
    order = rng.permutation(len(train))
    if val_split > 0:
        held_out = round(val_split * len(train))
        if not 0 < held_out < len(train):
            raise DataError(f"A val_split of {val_split} leaves {held_out} of {len(train)} pictures to evaluate on.")
        evaluation, order = train.take(np.sort(order[:held_out])), order[held_out:]
    else:
        target = _find(folder, EVALUATION_NAMES)
        if target is None:
            raise DataError(
                f"{folder} has no {', '.join(EVALUATION_NAMES)} folder or .npz; to hold out some of its training "
                "pictures, give --val-split 0.1."
            )
        evaluation = _align(open_pictures(target, class_names=class_names or train.class_names), train, target)
    if limit_train is not None:
        order = order[:limit_train]
    return train.take(np.sort(order)), evaluation


def open_evaluation(folder: str | Path, *, class_names: Sequence[str] | None = None) -> Pictures:
    """Evaluation pictures: FOLDER/val (or test, validation) where that exists, else FOLDER itself, or a .npz file."""
    folder = Path(folder)
    return open_pictures(_find(folder, EVALUATION_NAMES) or folder, class_names=class_names)


def open_pictures(source: Path, *, class_names: Sequence[str] | None = None) -> Pictures:
    """Every picture of one folder of classes, sorted by class and name, or of one .npz file.

    Raises:
        DataError: when there is none.
    """
    if source.suffix == ".npz":
        return _open_npz(source, class_names)
    if not source.is_dir():
        raise DataError(f"{source} is neither a folder nor a .npz file.")
    classes = sorted(path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise DataError(f"{source} has no class folders: put each class's pictures into {source}/CLASS/.")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(walk_pictures(source / name))
        if not files:
            raise DataError(f"{source / name} holds no pictures; remove the folder or fill it.")
        paths += files
        labels += [label] * len(files)
    return Pictures(FilePool(paths), np.arange(len(paths)), np.array(labels, dtype=np.int64), tuple(classes))


def _find(folder: Path, names: Sequence[str]) -> Path | None:
    candidates = (folder / f"{name}{suffix}" for name in names for suffix in ("", ".npz"))
    return next((path for path in candidates if path.exists()), None)


def _open_npz(path: Path, class_names: Sequence[str] | None) -> Pictures:
    try:
        with np.load(path, allow_pickle=False) as content:
            images, labels = content["images"], content["labels"].astype(np.int64)
            own = [str(name) for name in content["class_names"]] if "class_names" in content.files else None
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        reason = "it holds more than plain numbers" if "pickle" in str(error) else error
        raise DataError(f"{path} is not a readable .npz with the arrays images and labels: {reason}.") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != len(labels):
        raise DataError(
            f"{path}: images must be uint8 (N, H, W, 3) with as many labels, got {images.dtype} {images.shape} "
            f"and {len(labels)} labels."
        )
    listing = path.parent / "classes.txt"
    if own is None and listing.exists():
        own = listing.read_text(encoding="utf-8").split("\n")
        own = [name.strip() for name in own if name.strip()]
    count = int(labels.max()) + 1 if len(labels) else 0
    names = tuple(own or class_names or (str(label) for label in range(count)))
    if len(labels) == 0 or labels.min() < 0 or count > len(names):
        raise DataError(f"{path}: labels must lie in 0..{len(names) - 1}, one for each class name.")
    sizes = np.tile(np.array(images.shape[1:3]), (len(images), 1))
    pool = PackedPool(images.reshape(-1), sizes, [f"{path}[{index}]" for index in range(len(images))])
    return Pictures(pool, np.arange(len(images)), labels, names)


def _align(evaluation: Pictures, train: Pictures, source: Path) -> Pictures:
    """`evaluation` with its labels as numbers into the classes of `train`."""
    if unknown := sorted(set(evaluation.class_names) - set(train.class_names)):
        raise DataError(f"{source} has classes that the training pictures lack: {', '.join(unknown[:5])}.")
    numbers = np.array([train.class_names.index(name) for name in evaluation.class_names])
    return Pictures(evaluation.pool, evaluation.indices, numbers[evaluation.labels], train.class_names)
