"""Architecture and preprocessing of every variant, as rows of one table.

The numbers are those of Hatamizadeh & Kautz, "MambaVision: A Hybrid Mamba-Transformer Vision Backbone"
(CVPR 2025, arXiv 2407.08083), table 1 and section 3, and of the published weights. Standard library only,
so that listing variants never waits for torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal, get_args

CropMode = Literal["center", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
MixerOrder = Literal["mamba_first", "attention_first", "mamba_only", "attention_only"]
StepBiasInit = Literal["zero", "log_uniform"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NUM_LEVELS = 4


class UnknownVariantError(ValueError):
    """A model name that no row of `VARIANTS` has; the message lists the nearest names."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes the network's input; the same terms as timm's data config.

    Attributes:
        img_size: height and width in pixels after cropping.
        crop_pct: share of the resized picture that the crop keeps; the picture is resized to `img_size / crop_pct`.
        crop_mode: `center` keeps the aspect ratio (shorter side resized, centre cut out), `squash` does not.
        interpolation: resampling filter.
        mean: per-channel mean that is subtracted, for pixels in 0..1.
        std: per-channel standard deviation that is divided by.
    """

    img_size: tuple[int, int] = (224, 224)
    crop_pct: float = 1.0
    crop_mode: CropMode = "center"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", _pair("img_size", self.img_size))
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if min(self.img_size) < 1:
            raise ValueError(f"img_size must be at least 1 px a side, got {self.img_size}.")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must lie in (0, 1], got {self.crop_pct}.")
        _check_choice("crop_mode", self.crop_mode, CropMode)
        _check_choice("interpolation", self.interpolation, Interpolation)
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean and std must have one entry a channel each, got {len(self.mean)} and {len(self.std)}."
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}.")

    @property
    def resize_size(self) -> tuple[int, int]:
        """Height and width in pixels that a picture is resized to, or to cover, before the crop."""
        height, width = self.img_size
        return math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)

    def statistics(self, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std for so many channels: as they are, one repeated, or the average of several.

        Raises:
            ValueError: there is another number of them.
        """
        count = len(self.mean)
        if count != in_chans and 1 not in (count, in_chans):
            raise ValueError(f"The preprocessing normalises {count} channels and the model takes {in_chans}.")
        fitting = self.for_channels(in_chans)
        return fitting.mean, fitting.std

    def for_channels(self, in_chans: int) -> Preprocessing:
        """The same for another number of channels: their average for one, else repeated in turn."""
        if in_chans == len(self.mean):
            return self
        mean, std = (
            (sum(values) / len(values),) if in_chans == 1 else tuple(islice(cycle(values), in_chans))
            for values in (self.mean, self.std)
        )
        return dataclasses.replace(self, mean=mean, std=std)


@dataclass(frozen=True, kw_only=True)
class MambaVisionConfig:
    """One network: its shape, its regularisation, what it expects and what its outputs mean.

    Tuples of four have one entry a level (paper, figure 2: levels 0 and 1 are convolutional, 2 and 3 mix tokens in
    windows); the convolutional levels do not use `num_heads` and `window_size`.

    Attributes:
        dim: channels of level 0; each level doubles them.
        in_dim: channels between the two convolutions of the stem.
        depths: blocks a level.
        num_heads: attention heads a level; must divide the level's channels.
        window_size: side of a square window in tokens, a level.
        stem_strides: strides of the stem's two convolutions; (2, 2) in the paper, (1, 1) for tiny pictures.
        mlp_ratio: hidden width of an MLP over its input width.
        d_state: states of the selective scan a channel (N).
        d_conv: kernel size of the mixer's depthwise convolutions over tokens; odd.
        mixer_order: which blocks of a window level scan and which attend. `mamba_first` is the paper's choice: the
            first ceil(depth / 2) blocks use the MambaVision mixer, the rest self-attention.
        dt_bias_init: start of the scan's step bias: `zero` as in the published training, or Mamba's own inverse
            softplus of log-uniform steps in 1e-3..1e-1.
        layer_scale: start of the token blocks' residual scales, None for none.
        layer_scale_conv: the same for the convolution blocks.
        drop_rate: dropout before the classifier.
        attn_drop_rate: dropout of the attention weights; in training only.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
        num_classes: outputs of the classifier; 0 for none (the pooled vector comes out).
        in_chans: channels of the input picture.
        class_names: name of each output, or None when unknown.
        preprocessing: how pictures become inputs.

    Raises:
        ValueError: naming the field and the value, when a field is out of range.
    """

    dim: int
    in_dim: int
    depths: tuple[int, int, int, int]
    num_heads: tuple[int, int, int, int]
    window_size: tuple[int, int, int, int]
    stem_strides: tuple[int, int] = (2, 2)
    mlp_ratio: float = 4.0
    d_state: int = 8
    d_conv: int = 3
    mixer_order: MixerOrder = "mamba_first"
    dt_bias_init: StepBiasInit = "zero"
    layer_scale: float | None = None
    layer_scale_conv: float | None = None
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    num_classes: int = 1000
    in_chans: int = 3
    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)

    def __post_init__(self) -> None:
        for name in ("depths", "num_heads", "window_size"):
            values = getattr(self, name)
            listed = isinstance(values, (tuple, list)) and len(values) == NUM_LEVELS
            if not listed or any(not _is_int(value) or value < 1 for value in values):
                raise ValueError(f"{name} must be {NUM_LEVELS} positive integers, one a level, got {values!r}.")
            object.__setattr__(self, name, tuple(values))
        object.__setattr__(self, "stem_strides", _pair("stem_strides", self.stem_strides))
        if self.class_names is not None:
            if isinstance(self.class_names, str):  # two classes may have one name, as ImageNet's two cranes do
                raise ValueError(f"class_names must be a list of names, got the string {self.class_names!r}.")
            object.__setattr__(self, "class_names", tuple(self.class_names))
        if isinstance(self.preprocessing, Mapping):
            object.__setattr__(self, "preprocessing", Preprocessing(**self.preprocessing))
        if not isinstance(self.preprocessing, Preprocessing):
            raise ValueError(f"preprocessing must be a Preprocessing or its fields, got {self.preprocessing!r}.")
        for name in ("dim", "in_dim", "d_state", "in_chans"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}.")
        if any(stride not in (1, 2) for stride in self.stem_strides):
            raise ValueError(f"stem_strides must each be 1 or 2, got {self.stem_strides}.")
        if not _is_int(self.d_conv) or self.d_conv < 1 or self.d_conv % 2 == 0:
            raise ValueError(f"d_conv must be a positive odd integer, got {self.d_conv!r}.")
        if not _is_number(self.mlp_ratio) or self.channels[2] * self.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio must be a number that leaves an MLP a hidden channel, got {self.mlp_ratio!r}.")
        for name in ("layer_scale", "layer_scale_conv"):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or value <= 0):
                raise ValueError(f"{name} must be a positive number or None, got {value!r}.")
        for name in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise ValueError(f"{name} must be a number in [0, 1), got {value!r}.")
        if not _is_int(self.num_classes) or self.num_classes < 0:
            raise ValueError(f"num_classes must be an integer of at least 0, got {self.num_classes!r}.")
        _check_choice("mixer_order", self.mixer_order, MixerOrder)
        _check_choice("dt_bias_init", self.dt_bias_init, StepBiasInit)
        for level in range(2, NUM_LEVELS):
            channels, heads = self.channels[level], self.num_heads[level]
            if channels % heads:
                raise ValueError(f"num_heads {heads} of level {level} does not divide its {channels} channels.")
            if channels % 2:
                raise ValueError(f"dim {self.dim} gives level {level} an odd number of channels, {channels}.")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} entries for num_classes={self.num_classes}.")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level's feature map."""
        return tuple(self.dim * 2**level for level in range(NUM_LEVELS))

    @property
    def num_features(self) -> int:
        """Channels of the pooled vector."""
        return self.channels[-1]

    @property
    def reductions(self) -> tuple[int, ...]:
        """How many input pixels one side of a feature-map cell covers, a level."""
        stem = math.prod(self.stem_strides)
        return tuple(stem * 2**level for level in range(NUM_LEVELS))

    def window_for(self, img_size: int | tuple[int, int]) -> tuple[int, int, int, int]:
        """Window sizes with which every token level sees the whole map of an `img_size` picture."""
        side = max(_pair("img_size", img_size))
        fitted = [math.ceil(side / reduction) for reduction in self.reductions]
        return (*self.window_size[:2], fitted[2], fitted[3])

    def replace(self, **changes: Any) -> MambaVisionConfig:
        """A copy with `changes`; TypeError for a field that does not exist."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, fit for JSON."""
        fields: dict[str, Any] = _plain(dataclasses.asdict(self))
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> MambaVisionConfig:
        """The inverse of `to_dict`; ValueError lists the fields that do not exist."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"Unknown configuration fields: {', '.join(unknown)}.")
        return cls(**fields)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _pair(name: str, value: object) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(_is_int(entry) for entry in pair):
        raise ValueError(f"{name} must be an integer or two of them, got {value!r}.")
    return pair


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}.")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return value


def _row(
    dim: int,
    in_dim: int,
    depths: tuple[int, int, int, int],
    heads: tuple[int, int],
    window: tuple[int, int],
    drop_path: float,
    layer_scale: float | None,
    img_size: int,
    crop_pct: float,
    crop_mode: CropMode,
) -> MambaVisionConfig:
    return MambaVisionConfig(
        dim=dim,
        in_dim=in_dim,
        depths=depths,
        num_heads=(heads[0] // 4, heads[0] // 2, *heads),
        window_size=(8, 8, *window),
        drop_path_rate=drop_path,
        layer_scale=layer_scale,
        preprocessing=Preprocessing(img_size=(img_size, img_size), crop_pct=crop_pct, crop_mode=crop_mode),
    )


# Names, in the order of the paper's tables.  Columns: dim, in_dim, depths, heads and windows (levels 2 and 3),
# drop path, layer scale, input side, crop share, crop mode.
VARIANTS: dict[str, MambaVisionConfig] = {
    "mamba_vision_T": _row(80, 32, (1, 3, 8, 4), (8, 16), (14, 7), 0.2, None, 224, 1.0, "center"),
    "mamba_vision_T2": _row(80, 32, (1, 3, 11, 4), (8, 16), (14, 7), 0.2, None, 224, 0.98, "center"),
    "mamba_vision_S": _row(96, 64, (3, 3, 7, 5), (8, 16), (14, 7), 0.2, None, 224, 0.93, "center"),
    "mamba_vision_B": _row(128, 64, (3, 3, 10, 5), (8, 16), (14, 7), 0.3, 1e-5, 224, 1.0, "center"),
    "mamba_vision_B_21k": _row(128, 64, (3, 3, 10, 5), (8, 16), (14, 7), 0.3, 1e-5, 224, 1.0, "center"),
    "mamba_vision_L": _row(196, 64, (3, 3, 10, 5), (16, 32), (14, 7), 0.3, 1e-5, 224, 1.0, "center"),
    "mamba_vision_L_21k": _row(196, 64, (3, 3, 10, 5), (16, 32), (14, 7), 0.3, 1e-5, 224, 1.0, "center"),
    "mamba_vision_L2": _row(196, 64, (3, 3, 12, 5), (16, 32), (14, 7), 0.3, 1e-5, 224, 1.0, "center"),
    "mamba_vision_L2_512_21k": _row(196, 64, (3, 3, 12, 5), (16, 32), (32, 16), 0.3, 1e-5, 512, 0.93, "squash"),
    "mamba_vision_L3_256_21k": _row(256, 64, (3, 3, 20, 10), (16, 32), (16, 8), 0.5, 1e-5, 256, 1.0, "center"),
    "mamba_vision_L3_512_21k": _row(256, 64, (3, 3, 20, 10), (16, 32), (32, 16), 0.5, 1e-5, 512, 0.93, "squash"),
    # Ours, for 32 px pictures: the stem keeps the resolution, so the token levels see 8 x 8 and 4 x 4 maps.
    "mamba_vision_nano_32": MambaVisionConfig(
        dim=32,
        in_dim=32,
        depths=(3, 5, 8, 2),
        num_heads=(1, 2, 4, 8),
        window_size=(8, 8, 8, 4),
        stem_strides=(1, 1),
        drop_path_rate=0.1,
        num_classes=10,
        preprocessing=Preprocessing(img_size=(32, 32)),
    ),
    # For tests: every part of the architecture, in a second.
    "mamba_vision_test_tiny": MambaVisionConfig(
        dim=8,
        in_dim=8,
        depths=(1, 1, 2, 2),
        num_heads=(1, 1, 2, 4),
        window_size=(8, 8, 4, 2),
        layer_scale=1e-5,
        layer_scale_conv=1e-5,
        num_classes=10,
        preprocessing=Preprocessing(img_size=(64, 64)),
    ),
}


def get_config(name: str, **changes: Any) -> MambaVisionConfig:
    """Configuration of a variant with `changes` to its fields.

    Raises:
        UnknownVariantError: listing the nearest names.
    """
    if not isinstance(name, str):
        raise TypeError(f"A model's name must be a string, got {name!r}.")
    if name not in VARIANTS:
        by_lower = {variant.lower(): variant for variant in VARIANTS}
        near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.3)
        what = "the nearest names are" if near else "there are"
        raise UnknownVariantError(
            f"Unknown model {name!r}; {what} {', '.join(by_lower[key] for key in near or by_lower)}."
        )
    return VARIANTS[name].replace(**changes)
