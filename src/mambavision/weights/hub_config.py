"""The `config.json` of Hugging Face repositories: which of its fields say what about a network.

The public repositories have the architecture, the preprocessing and the labels; what they leave out because no
published network differs in it (the stem's strides, the picture's size, ...) is written beside it, named as ours is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mambavision.config import MambaVisionConfig, Preprocessing

MODEL_TYPE = "mambavision"
SHAPE_FIELDS = ("dim", "in_dim", "depths", "num_heads", "window_size")
OPTIONAL_FIELDS = (
    *("mlp_ratio", "drop_path_rate", "layer_scale", "layer_scale_conv"),
    *("stem_strides", "d_state", "d_conv", "mixer_order", "dt_bias_init", "drop_rate", "attn_drop_rate"),
)
PREPROCESSING_FIELDS = ("mean", "std", "crop_pct", "crop_mode", "interpolation")


def network_config(
    fields: Mapping[str, Any], *, num_classes: int, in_chans: int, class_names: Sequence[str] | None = None
) -> MambaVisionConfig:
    """The network that a `config.json` describes.

    Without `image_size` the picture is the one that a window of level 2 covers, as in every published network.

    Raises:
        KeyError: a field of the architecture is missing.
        ValueError: a value is out of range.
    """
    strides = fields.get("stem_strides", (2, 2))
    side = fields["window_size"][2] * 4 * math.prod(strides)
    preprocessing = {key: fields[key] for key in PREPROCESSING_FIELDS if key in fields}
    return MambaVisionConfig(
        **{key: fields[key] for key in SHAPE_FIELDS},
        **{key: fields[key] for key in OPTIONAL_FIELDS if key in fields},
        num_classes=num_classes,
        in_chans=in_chans,
        class_names=None if class_names is None else tuple(class_names),
        preprocessing=Preprocessing(img_size=fields.get("image_size") or (side, side), **preprocessing),
    )


def hub_fields(config: MambaVisionConfig) -> dict[str, Any]:
    """The fields of a `config.json` for a network: the inverse of `network_config`, labels included."""
    every = config.to_dict()
    preprocessing = every["preprocessing"]
    names = config.class_names or [f"LABEL_{index}" for index in range(config.num_classes)]
    return {
        "model_type": MODEL_TYPE,
        **{key: every[key] for key in (*SHAPE_FIELDS, *OPTIONAL_FIELDS)},
        **{key: preprocessing[key] for key in PREPROCESSING_FIELDS},
        "image_size": preprocessing["img_size"],
        "num_channels": config.in_chans,
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
