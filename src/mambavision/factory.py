"""`create_model`: the one place where configuration, network and weights meet."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mambavision.config import VARIANTS, MambaVisionConfig, Preprocessing, get_config
from mambavision.models.backbone import MambaVisionBackbone
from mambavision.models.classifier import MambaVision
from mambavision.weights import CheckpointError, fetch_weights, load_weights, read_checkpoint

# What the weights' shapes and arithmetic depend on; a checkpoint's own values must equal the named variant's.
_ARCHITECTURE = (
    "dim",
    "in_dim",
    "depths",
    "num_heads",
    "stem_strides",
    "mlp_ratio",
    "d_state",
    "d_conv",
    "mixer_order",
)


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` takes and that match a shell-style pattern, in the paper's order."""
    return [name for name in VARIANTS if fnmatch.fnmatch(name.lower(), pattern.lower())]


def create_model(
    model_name: str | None,
    *,
    pretrained: bool = False,
    model_path: str | os.PathLike[str] | None = None,
    checkpoint_path: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    in_chans: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    window_size: Sequence[int] | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **config_fields: Any,
) -> MambaVision | MambaVisionBackbone:
    """Build a variant, with or without weights, as a classifier or as a backbone of feature maps.

    The network comes in training mode without weights and in evaluation mode with them.

    Args:
        model_name: a name of `list_models`, or None to take the architecture from `checkpoint_path`.
        pretrained: load the published weights, from `model_path` or fetched from the Hugging Face Hub.
        model_path: file with the published weights; with `pretrained`, they are downloaded to it when it is missing.
        checkpoint_path: file or folder with weights of your own, in any format that `read_checkpoint` knows. Class
            names and preprocessing stored in it are taken over.
        num_classes: outputs of the classifier; a new head is made when the weights have another number. 0 for none.
        class_names: name of each output; sets `num_classes`.
        in_chans: channels of the pictures; the weights of the first convolution are adapted.
        img_size: side or (height, width) in pixels for which windows cover the whole map, and to which pictures are
            resized. Without it the published windows stay; any picture size works either way.
        window_size: side of the windows in tokens, four entries, one a level; goes before what `img_size` gives.
        features_only: return a `MambaVisionBackbone`, whose output is a list of feature maps.
        out_indices: levels whose maps it returns; all four by default.
        device: where to put the network; `meta` makes shapes without memory.
        dtype: type of the parameters.
        **config_fields: other fields of `MambaVisionConfig`, for instance `drop_path_rate`.

    Returns:
        The network.

    Raises:
        UnknownVariantError: no such model; the message lists the nearest names.
        TypeError: an argument that neither this function nor `MambaVisionConfig` has.
        ValueError: arguments that exclude each other, or a value out of range.
        FileNotFoundError: no file at `checkpoint_path`.
        CheckpointError: weights that cannot be fetched, read or loaded.
    """
    if pretrained and checkpoint_path is not None:
        raise ValueError("Pass either pretrained=True or checkpoint_path, not both.")
    if model_path is not None and not pretrained:
        raise ValueError(
            "model_path says where the published weights lie: pass pretrained=True with it, or checkpoint_path."
        )
    if out_indices is not None and not features_only:
        raise ValueError("out_indices chooses feature maps: pass features_only=True with it.")

    config = None if model_name is None else get_config(model_name)
    checkpoint = None
    if pretrained:
        if model_name is None:
            raise ValueError("pretrained=True needs a model name.")
        checkpoint = read_checkpoint(fetch_weights(model_name, model_path=model_path))
    elif checkpoint_path is not None:
        checkpoint = read_checkpoint(checkpoint_path)
    if pretrained and config is not None and checkpoint is not None and checkpoint.config is not None:
        if checkpoint.config.num_classes != config.num_classes:
            raise CheckpointError(
                f"{checkpoint.path} has {checkpoint.config.num_classes} classes, so it is not the published weights of "
                f"{model_name}: pass weights of your own as checkpoint_path, without pretrained."
            )
        # The table knows the published networks; what a file adds is the names of its classes.
        config = config.replace(class_names=checkpoint.config.class_names)
    elif checkpoint is not None and checkpoint.config is not None:
        config = _reconciled(config, checkpoint.config, model_name, str(checkpoint.path))
    if config is None:
        if checkpoint is None:
            raise ValueError("Give a model name, or a checkpoint that carries its architecture.")
        raise CheckpointError(f"{checkpoint.path} does not say which network it is of: name the model, too.")
    config = adapted_config(
        config,
        num_classes=num_classes,
        class_names=class_names,
        in_chans=in_chans,
        img_size=img_size,
        window_size=window_size,
        **config_fields,
    )

    network: MambaVision | MambaVisionBackbone
    if features_only:
        indices = (0, 1, 2, 3) if out_indices is None else out_indices
        network = MambaVisionBackbone(config, out_indices=indices, device=device, dtype=dtype)
    else:
        network = MambaVision(config, device=device, dtype=dtype)
    if checkpoint is not None:
        load_weights(
            network, checkpoint.state_dict, allow_head_change=num_classes is not None or class_names is not None
        )
        network.eval()
    return network


def _reconciled(
    named: MambaVisionConfig | None, stored: MambaVisionConfig, model_name: str | None, path: str
) -> MambaVisionConfig:
    """The checkpoint's configuration, if it is of the named variant's architecture."""
    if named is None:
        return stored
    if different := [field for field in _ARCHITECTURE if getattr(named, field) != getattr(stored, field)]:
        pairs = ", ".join(f"{field} {getattr(stored, field)} instead of {getattr(named, field)}" for field in different)
        raise CheckpointError(f"{path} does not hold a {model_name}: it has {pairs}.")
    return stored


def adapted_config(
    config: MambaVisionConfig,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    in_chans: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    window_size: Sequence[int] | None = None,
    **config_fields: Any,
) -> MambaVisionConfig:
    """`config` with changes that `create_model` takes, and with what follows from them; None changes nothing.

    Raises:
        TypeError: a field that `MambaVisionConfig` does not have.
        ValueError: a value out of range, or a number of classes that contradicts their names.
    """
    changes = dict(config_fields)
    known = {field.name for field in dataclasses.fields(MambaVisionConfig)}
    if unknown := sorted(set(changes) - known):
        near = difflib.get_close_matches(unknown[0], known, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else "see MambaVisionConfig for what there is."
        raise TypeError(f"create_model has no argument {unknown[0]!r}; {hint}")
    if isinstance(class_names, str):
        raise ValueError(f"class_names must be a list of names, got the string {class_names!r}.")
    if class_names is not None:
        changes.update(class_names=tuple(class_names), num_classes=len(class_names))
        if num_classes not in (None, len(class_names)):
            raise ValueError(f"num_classes={num_classes} contradicts the {len(class_names)} class_names.")
    elif num_classes is not None and num_classes != config.num_classes:
        changes.update(num_classes=num_classes, class_names=None)
    preprocessing = changes.pop("preprocessing", config.preprocessing)
    if isinstance(preprocessing, Mapping):
        preprocessing = Preprocessing(**preprocessing)
    if in_chans is not None and in_chans != config.in_chans:
        if not isinstance(in_chans, int) or in_chans < 1:
            raise ValueError(f"in_chans must be a positive integer, got {in_chans!r}.")
        changes["in_chans"] = in_chans
        preprocessing = preprocessing.for_channels(in_chans)
    if img_size is not None:
        preprocessing = dataclasses.replace(
            preprocessing, img_size=(img_size, img_size) if isinstance(img_size, int) else img_size
        )
        changes["window_size"] = config.window_for(img_size)
    if window_size is not None:
        changes["window_size"] = window_size
    return config.replace(preprocessing=preprocessing, **changes)
