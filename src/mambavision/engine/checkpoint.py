"""Checkpoints of a run in progress; finished weights are written by `mambavision.weights.save_checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mambavision.files import replaced_when_done

LAST = "last.pt"
FORMAT = 1


def save_run(path: Path, state: dict[str, Any]) -> None:
    """Write `state`, tensors and plain values, so that `path` is the old checkpoint or the complete new one."""
    with replaced_when_done(path) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)


def load_run(path: Path) -> dict[str, Any]:
    """Read what `save_run` wrote, on the CPU, without running code from it.

    Raises:
        ValueError: when it is no checkpoint of a run.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; --resume takes the {LAST} of a run, or auto.") from None
    except Exception as error:  # torch raises a dozen types for a damaged file, and some advise to run its code
        raise ValueError(f"{path} is damaged or no checkpoint of a run; --resume takes the {LAST} of one.") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of a run; --resume takes the {LAST} that training writes.")
    return state
