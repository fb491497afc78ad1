"""Small models for transformers, and a repository of the public layout with code that must not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deterministic_weights import deterministic_state_dict
from mambavision import create_model
from mambavision.config import VARIANTS
from mambavision.integrations.huggingface import MambaVisionConfig
from mambavision.models.classifier import MambaVision
from weight_files import public_config, public_repository

REMOTE_CLASSES = {
    "AutoConfig": "configuration_mambavision.MambaVisionConfig",
    "AutoModel": "modeling_mambavision.MambaVisionModel",
    "AutoModelForImageClassification": "modeling_mambavision.MambaVisionModelForImageClassification",
}


def tiny_config(**changes: Any) -> MambaVisionConfig:
    """Configuration of `mamba_vision_test_tiny`: ten labels, pictures of 64 px."""
    return MambaVisionConfig.from_network_config(VARIANTS["mamba_vision_test_tiny"], **changes)


def tiny_network(variant: str = "mamba_vision_test_tiny", **changes: Any) -> MambaVision:
    """A network of ours in evaluation mode, with weights that differ from any initialisation."""
    network = create_model(variant, **changes)
    network.load_state_dict(deterministic_state_dict({name: t.shape for name, t in network.state_dict().items()}))
    return network.eval()


def remote_repository(folder: Path, network: MambaVision, **changes: Any) -> Path:
    """A repository as the public ones are: code of its own, prefixed names, no `preprocessor_config.json`."""
    fields = public_config(network.config, auto_map=REMOTE_CLASSES, torch_dtype="float32", **changes)
    public_repository(folder, network.state_dict(), fields)
    for place in set(REMOTE_CLASSES.values()):
        (folder / f"{place.split('.')[0]}.py").write_text("raise AssertionError('remote code was run')\n")
    return folder


def pictures(batch: int = 2, side: int = 64, channels: int = 3) -> torch.Tensor:
    """Normalised pictures."""
    return torch.randn(batch, channels, side, side)
