"""`MambaVisionConfig` of transformers: the fields of the public repositories' `config.json`, and ours beside them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from mambavision.config import NUM_LEVELS, VARIANTS, CropMode, Interpolation, MixerOrder, StepBiasInit
from mambavision.config import MambaVisionConfig as NetworkConfig
from mambavision.weights.hub_config import MODEL_TYPE, hub_fields, network_config

try:
    from transformers.backbone_utils import BackboneConfigMixin
except ImportError:  # transformers 4
    from transformers.utils.backbone_utils import BackboneConfigMixin

_DEFAULT = VARIANTS["mamba_vision_T"]
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # owner and repository


class MambaVisionConfig(BackboneConfigMixin, PretrainedConfig):
    """Shape, regularisation, preprocessing and labels of a network; by default mamba_vision_T's.

    Args:
        dim: channels of level 0; each level doubles them.
        in_dim: channels between the two convolutions of the stem.
        depths: blocks a level, four entries.
        num_heads: attention heads a level, four entries.
        window_size: side of a window in tokens a level, four entries.
        mlp_ratio: hidden width of an MLP over its input width.
        drop_path_rate: stochastic depth of the last block.
        layer_scale: start of the token blocks' residual scales, None for none.
        layer_scale_conv: the same for the convolution blocks.
        stem_strides: strides of the stem's two convolutions.
        d_state: states of the selective scan a channel.
        d_conv: kernel size of the mixer's convolutions over tokens.
        mixer_order: which blocks of a window level scan and which attend.
        dt_bias_init: start of the scan's step bias.
        drop_rate: dropout before the classifier.
        attn_drop_rate: dropout of the attention weights.
        num_channels: channels of the picture.
        image_size: side or (height, width) of the network's input; None for what a window of level 2 covers.
        mean: per-channel mean for pixels in 0..1.
        std: per-channel standard deviation.
        crop_pct: share of the resized picture that the crop keeps.
        crop_mode: `center` or `squash`.
        interpolation: resampling filter.
        out_features: stages that `MambaVisionBackbone` returns: `stem`, `stage1` to `stage4`; by default the last.
        out_indices: the same by number, 0 to 4; one of the two suffices.
        **kwargs: what every configuration of transformers takes: `num_labels`, `id2label`, `problem_type`, ...

    Raises:
        ValueError: naming the field and the value, when one is out of range.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        dim: int = _DEFAULT.dim,
        in_dim: int = _DEFAULT.in_dim,
        depths: Sequence[int] = _DEFAULT.depths,
        num_heads: Sequence[int] = _DEFAULT.num_heads,
        window_size: Sequence[int] = _DEFAULT.window_size,
        mlp_ratio: float = _DEFAULT.mlp_ratio,
        drop_path_rate: float = _DEFAULT.drop_path_rate,
        layer_scale: float | None = None,
        layer_scale_conv: float | None = None,
        stem_strides: Sequence[int] = _DEFAULT.stem_strides,
        d_state: int = _DEFAULT.d_state,
        d_conv: int = _DEFAULT.d_conv,
        mixer_order: MixerOrder = _DEFAULT.mixer_order,
        dt_bias_init: StepBiasInit = _DEFAULT.dt_bias_init,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        num_channels: int = 3,
        image_size: int | Sequence[int] | None = None,
        mean: Sequence[float] = _DEFAULT.preprocessing.mean,
        std: Sequence[float] = _DEFAULT.preprocessing.std,
        crop_pct: float = _DEFAULT.preprocessing.crop_pct,
        crop_mode: CropMode = _DEFAULT.preprocessing.crop_mode,
        interpolation: Interpolation = _DEFAULT.preprocessing.interpolation,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        # Kept apart: a config with this attribute makes the Auto classes think of remote code.
        auto_map = kwargs.pop("auto_map", None)
        super().__init__(**kwargs)
        self._auto_map = auto_map
        self.dim = dim
        self.in_dim = in_dim
        self.depths = list(depths)
        self.num_heads = list(num_heads)
        self.window_size = list(window_size)
        self.mlp_ratio = mlp_ratio
        self.drop_path_rate = drop_path_rate
        self.layer_scale = layer_scale
        self.layer_scale_conv = layer_scale_conv
        self.stem_strides = list(stem_strides)
        self.d_state = d_state
        self.d_conv = d_conv
        self.mixer_order = mixer_order
        self.dt_bias_init = dt_bias_init
        self.drop_rate = drop_rate
        self.attn_drop_rate = attn_drop_rate
        self.num_channels = num_channels
        self.image_size = image_size
        self.mean = list(mean)
        self.std = list(std)
        self.crop_pct = crop_pct
        self.crop_mode = crop_mode
        self.interpolation = interpolation
        network = self.network_config()  # checks every field
        self.image_size = list(network.preprocessing.img_size)
        self.stage_names = ["stem", *(f"stage{level + 1}" for level in range(NUM_LEVELS))]
        self._choose_stages(out_features, out_indices)

    # The dataclass machinery of transformers 5 would compare the fields of the base class alone.
    __eq__ = PretrainedConfig.__eq__
    __hash__ = None  # type: ignore[assignment]  # it can change, like every configuration of transformers

    @classmethod
    def from_network_config(cls, config: NetworkConfig, **kwargs: Any) -> MambaVisionConfig:
        """The same network, preprocessing and labels in transformers' terms; `kwargs` as for the constructor."""
        fields = hub_fields(config)
        if kwargs.get("num_labels", config.num_classes) != config.num_classes:
            del fields["id2label"], fields["label2id"]
        return cls(**{**fields, **kwargs})

    def network_config(self, *, num_classes: int = 0) -> NetworkConfig:
        """The same network in our own terms.

        Args:
            num_classes: outputs of the classifier; labels come along when it is `num_labels`.
        """
        names = [self.id2label[index] for index in range(num_classes)] if num_classes == self.num_labels else None
        return network_config(
            self.__dict__, num_classes=num_classes, in_chans=self.num_channels, class_names=names or None
        )

    @property
    def hidden_sizes(self) -> list[int]:
        """Channels of each level."""
        return [self.dim * 2**level for level in range(NUM_LEVELS)]

    @property
    def hidden_size(self) -> int:
        """Channels of the pooled vector."""
        return self.hidden_sizes[-1]

    @property
    def num_hidden_layers(self) -> int:
        """Levels; each gives one of `hidden_states`."""
        return NUM_LEVELS

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; remote code is named with the repository on the hub where it lies, or not at all."""
        fields = super().to_dict()
        auto_map = fields.pop("_auto_map", None) or {}
        source = self.name_or_path
        if _HUB_NAME.fullmatch(source or "") and not os.path.isdir(source):
            auto_map = {name: place if "--" in place else f"{source}--{place}" for name, place in auto_map.items()}
        if elsewhere := {name: place for name, place in auto_map.items() if "--" in place}:
            fields["auto_map"] = elsewhere
        return fields

    def _choose_stages(self, out_features: Sequence[str] | None, out_indices: Sequence[int] | None) -> None:
        if out_features is None and out_indices is not None:
            self.out_indices = list(out_indices)
            return
        self.out_features = None if out_features is None else list(out_features)
        if out_indices is not None and [index % (NUM_LEVELS + 1) for index in out_indices] != self.out_indices:
            raise ValueError(f"out_features {self.out_features} and out_indices {list(out_indices)} name other stages.")
