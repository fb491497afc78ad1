"""Any supported weight file as a `Checkpoint`, without ever running what is in it.

Supported are our own safetensors files, the `model.safetensors` of the public Hugging Face repositories with the
`config.json` beside it, whole or in shards with their index, and PyTorch archives (`.pth.tar`, `.pth`, `.pt`). An
archive is a pickle, and a pickle is a program: it goes through PyTorch's restricted unpickler, which builds tensors and
plain containers, and here also an `argparse.Namespace`, because training scripts store their flags as one. Anything
else is refused, not run.

Damage inside the tensors is found where the format has checksums: in zip archives, which PyTorch writes since 1.6.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mambavision.config import MambaVisionConfig
from mambavision.weights.checkpoint import HEADER_KEY, Checkpoint, CheckpointError, listed
from mambavision.weights.hub_config import MODEL_TYPE, network_config

logger = logging.getLogger(__name__)

FIRST_CONV = "patch_embed.conv_down.0.weight"
HEAD = "head.weight"
HUB_MODEL = "model.safetensors"
HUB_INDEX = "model.safetensors.index.json"  # which shard holds which tensor, where `save_pretrained` made several files
HUB_CONFIG = "config.json"

# Where training scripts keep the weights, the preferred key first: averaged weights are those that were evaluated.
STATE_DICT_KEYS = ("state_dict_ema", "state_dict", "model")
# Added to every name by DistributedDataParallel, by the Hugging Face wrapper and by torch.compile.
PREFIXES = ("module.", "model.", "_orig_mod.")

_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"
_PLAIN = (str, int, float, bool, type(None))


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a weight file of any supported format; the content decides which, not the name.

    Args:
        path: the file, or a folder with a `model.safetensors` or its shards.

    Raises:
        FileNotFoundError: when there is no such file.
        CheckpointError: when the file is empty, truncated, corrupt, of another kind, or a pickle that asks for code.
    """
    path = _existing_file(Path(path))
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} is empty; copy or download it again.")
    if start[8:9] == b"{":  # safetensors: the header's length in 8 bytes, then its JSON
        checkpoint = _read_safetensors(path)
    elif start.startswith((_ZIP_MAGIC, _PICKLE_MAGIC)):
        checkpoint = _read_archive(path)
    elif path.name == HUB_INDEX:
        checkpoint = _read_shards(path)
    else:
        raise CheckpointError(
            f"{path} is neither a safetensors file nor a PyTorch archive: it starts with {start[:24]!r}."
        )
    checkpoint.state_dict = without_prefixes(checkpoint.state_dict)
    if checkpoint.config is None and path.name in (HUB_MODEL, HUB_INDEX) and (path.parent / HUB_CONFIG).is_file():
        checkpoint.config = _read_hub_config(path.parent / HUB_CONFIG, checkpoint.state_dict)
    return checkpoint


def _existing_file(path: Path) -> Path:
    if path.is_dir():
        for name in (HUB_MODEL, HUB_INDEX):
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"The folder {path} holds no {HUB_MODEL} or {HUB_INDEX}; give the weight file itself.")
    if not path.exists():
        raise FileNotFoundError(f"There is no weight file {path}; check the path.")
    return path


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is a truncated or corrupt safetensors file: {_reason(error)}.") from error
    if HEADER_KEY not in metadata:
        return Checkpoint(state_dict=state_dict, path=path)
    try:
        header = json.loads(metadata[HEADER_KEY])
        return Checkpoint(
            state_dict=state_dict,
            config=MambaVisionConfig.from_dict(header["config"]),
            metrics=header["metrics"],
            extra=header["extra"],
            path=path,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The {HEADER_KEY} header of {path} is not one this version reads: {_reason(error)}."
        ) from error


def _read_shards(index: Path) -> Checkpoint:
    """The tensors of all files that an index names, which lie beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"shards {listed(names)}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{index} is not an index of shards beside it: {_reason(error)}.") from error
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(f"{index.parent} lacks {listed(missing)}, which {index.name} names; copy it there, too.")
    shards = [_read_safetensors(index.parent / name).state_dict for name in names]
    return Checkpoint(state_dict={name: value for shard in shards for name, value in shard.items()}, path=index)


def _read_archive(path: Path) -> Checkpoint:
    content = _unpickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict.")
    return Checkpoint(
        state_dict=weights_within(content, path=path),
        extra={key: value for key, value in content.items() if isinstance(value, _PLAIN)},
        path=path,
    )


def weights_within(content: Mapping[Any, Any], *, path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The state dict that a training script's checkpoint holds, or that `content` is.

    Raises:
        CheckpointError: naming `path`, when there are no tensors or not tensors alone.
    """
    keys = [key for key in STATE_DICT_KEYS if isinstance(content.get(key), Mapping)]
    weights = content[keys[0]] if keys else content
    if len(keys) > 1:
        logger.warning("%s holds %s; %s is used.", path, " and ".join(keys), keys[0])
    if not weights:
        raise CheckpointError(f"{path} holds an empty state dict.")
    if foreign := [str(name) for name, value in weights.items() if not isinstance(value, torch.Tensor)]:
        where = f"under {keys[0]!r}" if keys else f"and none of the keys {', '.join(STATE_DICT_KEYS)}"
        raise CheckpointError(f"{path} holds entries that are not tensors {where}: {listed(foreign)}.")
    return {str(name): value.detach() for name, value in weights.items()}


def _unpickle(path: Path) -> Any:
    """Content of a PyTorch archive, built by the restricted unpickler."""
    # A caller who allows Namespace anyway must find it still allowed afterwards.
    already_allowed = torch.serialization.get_safe_globals()
    needed: list[Any] = [] if argparse.Namespace in already_allowed else [argparse.Namespace]
    try:
        _check_sums(path)
        # An opened file: from a name alone, torch.load goes by its suffix.
        with torch.serialization.safe_globals(needed), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|unrecognized function|classes allowlisted.*but got) ([^\s;]+)", str(error))
        what = f"it asks for {asked[1]}" if asked else "it uses pickle instructions that weights do not need"
        raise CheckpointError(
            f"{path} is refused and nothing in it was run: {what}; ask for a safetensors file with its tensors."
        ) from error
    except Exception as error:  # garbage bytes make an unpickler raise anything at all
        raise CheckpointError(f"{path} is a truncated or corrupt PyTorch archive: {_reason(error)}.") from error


def _check_sums(path: Path) -> None:
    """BadZipFile when a member of a zip archive is not what was written; PyTorch does not look."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def without_prefixes(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the network's own names: what wrappers put before all of them is taken off."""
    for prefix in PREFIXES:
        if state_dict and all(name.startswith(prefix) for name in state_dict):
            # Prefixes nest in any order, so start over with what is left.
            return without_prefixes({name.removeprefix(prefix): value for name, value in state_dict.items()})
    return state_dict


def _read_hub_config(path: Path, state_dict: dict[str, torch.Tensor]) -> MambaVisionConfig | None:
    """Configuration from a Hugging Face `config.json`; None when it describes another architecture."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.get("model_type") != MODEL_TYPE:
            return None
        # The tensors tell the outputs and inputs; a label list of another length belongs to another head.
        outputs = len(state_dict[HEAD]) if HEAD in state_dict else 0
        labels = {int(index): str(label) for index, label in fields.get("id2label", {}).items()}
        return network_config(
            fields,
            num_classes=outputs,
            in_chans=state_dict[FIRST_CONV].shape[1],
            class_names=[labels[index] for index in range(outputs)] if len(labels) == outputs > 0 else None,
        )
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a MambaVision network: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    """The error's kind and first sentence, without advice and closing stop, to stand inside a sentence."""
    first = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
    return f"{type(error).__name__}, {first}" if first else type(error).__name__
