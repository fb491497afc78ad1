"""A checkpoint in memory, and our own file format: one safetensors file that says what it is.

The safetensors header carries a JSON text under the key `mambavision` with `config` (`MambaVisionConfig.to_dict`:
architecture, class names, preprocessing), `metrics` and `extra`. Nothing in such a file can run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mambavision.config import MambaVisionConfig
from mambavision.files import replaced_when_done

HEADER_KEY = "mambavision"


class CheckpointError(RuntimeError):
    """Weights that cannot be fetched, read or loaded; the message names the file or the tensors and the reason."""


@dataclass(kw_only=True)
class Checkpoint:
    """What a weight file holds.

    Attributes:
        state_dict: tensors on the CPU in their stored types, under the network's own names (no `module.`, `model.`).
        config: architecture, class names and preprocessing, or None when the file does not tell.
        metrics: measured values by name, for instance `top1` in percent.
        extra: other plain values found in the file.
        path: the file that was read.
    """

    state_dict: dict[str, torch.Tensor]
    config: MambaVisionConfig | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    path: Path


def save_checkpoint(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, torch.Tensor],
    config: MambaVisionConfig,
    *,
    metrics: Mapping[str, float] | None = None,
    extra: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write one self-describing safetensors file, atomically: `path` is the old file or the complete new one.

    Args:
        path: file to write; missing folders are made.
        state_dict: tensors of any device and memory layout.
        config: architecture, class names and preprocessing that belong to the tensors.
        metrics: measured values by name.
        extra: other values that JSON can hold.
        dtype: type in which floating-point tensors are stored; None keeps theirs. Integers keep theirs.

    Raises:
        CheckpointError: when a tensor is on the meta device and so has no values.
        TypeError: when `metrics` or `extra` hold something that JSON cannot.
    """
    if without_values := [name for name, tensor in state_dict.items() if tensor.is_meta]:
        raise CheckpointError(f"Cannot save {path}: {listed(without_values)} on the meta device without values.")
    header = json.dumps({"config": config.to_dict(), "metrics": dict(metrics or {}), "extra": dict(extra or {})})
    tensors = {
        name: tensor.detach().to(
            device="cpu",
            dtype=dtype if tensor.is_floating_point() else None,
            copy=True,  # safetensors refuses tensors that share memory
            memory_format=torch.contiguous_format,
        )
        for name, tensor in state_dict.items()
    }
    with replaced_when_done(Path(path)) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata={"format": "pt", HEADER_KEY: header})
        temporary.chmod(mode)  # safetensors lets only the owner read, whatever the umask says


def listed(names: list[str], *, limit: int = 8) -> str:
    """`names` as text, with the count instead of those beyond `limit`."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
