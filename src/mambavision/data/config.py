"""Typed settings of the data: which pictures, and how they are varied. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Crop = Literal["rrc", "pad"]
MixMode = Literal["batch", "pair", "elem"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures.

    Attributes:
        dir: folder with train/CLASS/PICTURE and val/CLASS/PICTURE (or test, validation), with CLASS/PICTURE alone
            (then set val_split), or with train.npz and val.npz (images uint8 (N, H, W, 3), labels (N,)).
        val_split: share of the training pictures that is held out for evaluation; the folder's own evaluation
            pictures are then left untouched. 0 evaluates on those.
        split_seed: which pictures val_split takes; apart from `seed`, so that runs of many seeds share a split.
        limit_train: train on so many pictures only, a random choice by split_seed.
        class_names: names of the classes of a train.npz that carries none.
        cache: decode every picture once and keep all of them in memory, as bytes.
        workers: processes that prepare training pictures, one a core at most; 0 does it in the training process.
    """

    dir: str | None = None
    val_split: float = 0.0
    split_seed: int = 0
    limit_train: int | None = None
    class_names: tuple[str, ...] | None = None
    cache: bool = False
    workers: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.val_split < 1:
            raise ValueError(f"val_split must lie in [0, 1), got {self.val_split}.")
        check_at_least("split_seed", self.split_seed, 0)
        check_at_least("workers", self.workers, 0)
        if self.limit_train is not None:
            check_at_least("limit_train", self.limit_train, 1)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training pictures are varied; the terms are timm's.

    Attributes:
        crop: `rrc` crops a random share of the picture and resizes it; `pad` pads by `pad` pixels and crops at
            random, as is usual for pictures of 32 px.
        pad: pixels added on each side by crop `pad`.
        scale: smallest and largest share of the area that `rrc` keeps.
        ratio: smallest and largest aspect ratio of `rrc`.
        interpolation: resampling filter: bilinear, bicubic or random (of both).
        hflip: probability of a horizontal flip.
        auto_augment: timm's policy string, such as rand-m9-mstd0.5-inc1; null for none.
        color_jitter: strength of brightness, contrast and saturation changes; used without auto_augment.
        erasing: probability that a random rectangle is replaced by noise.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none.
        mix_prob: probability that a batch (or pair, or picture, see mix_mode) is mixed at all.
        mix_switch_prob: probability of cutmix where both are on.
        mix_mode: whether a batch, a pair or each picture draws its own mix; `pair` and `elem` are loops and slower.
    """

    crop: Crop = "rrc"
    pad: int = 4
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    hflip: float = 0.5
    auto_augment: str | None = None
    color_jitter: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5
    mix_mode: MixMode = "batch"

    def __post_init__(self) -> None:
        check_one_of("crop", self.crop, Crop)
        check_one_of("mix_mode", self.mix_mode, MixMode)
        check_at_least("pad", self.pad, 0)
        for name in ("hflip", "erasing", "mix_prob", "mix_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability and must lie in [0, 1], got {getattr(self, name)}.")
        for name in ("color_jitter", "mixup", "cutmix"):
            check_at_least(name, getattr(self, name), 0)
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two positive numbers in rising order, got {(low, high)}.")

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


def check_at_least(name: str, value: float, least: float) -> None:
    """ValueError naming the setting and its value when it is below `least`."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_one_of(name: str, value: str, choices: Any) -> None:
    """ValueError naming the setting and its value when it is none of the literal type `choices`."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}.")
