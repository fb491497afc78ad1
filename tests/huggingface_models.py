"""Small models for transformers."""

from __future__ import annotations

from typing import Any

import torch

from deterministic_weights import deterministic_state_dict
from mambavision import create_model
from mambavision.config import VARIANTS
from mambavision.integrations.huggingface import MambaVisionConfig
from mambavision.models.classifier import MambaVision


def tiny_config(**changes: Any) -> MambaVisionConfig:
    """Configuration of `mamba_vision_test_tiny`: ten labels, pictures of 64 px."""
    return MambaVisionConfig.from_network_config(VARIANTS["mamba_vision_test_tiny"], **changes)


def tiny_network(variant: str = "mamba_vision_test_tiny", **changes: Any) -> MambaVision:
    """A network of ours in evaluation mode, with weights that differ from any initialisation."""
    network = create_model(variant, **changes)
    network.load_state_dict(deterministic_state_dict({name: t.shape for name, t in network.state_dict().items()}))
    return network.eval()


def pictures(batch: int = 2, side: int = 64, channels: int = 3) -> torch.Tensor:
    """Normalised pictures."""
    return torch.randn(batch, channels, side, side)
