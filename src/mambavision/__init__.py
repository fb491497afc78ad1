"""MambaVision: a hybrid Mamba-Transformer vision backbone that runs wherever PyTorch runs.

from mambavision import create_model
model = create_model("mamba_vision_T", pretrained=True)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambavision.config import MambaVisionConfig
    from mambavision.factory import create_model, list_models
    from mambavision.inference.predictor import Predictor

__version__ = "0.1.0"

__all__ = ["MambaVisionConfig", "Predictor", "__version__", "create_model", "list_models"]

# Loaded on first use (PEP 562): importing the package costs nothing that the caller does not need.
_HOMES = {
    "MambaVisionConfig": "mambavision.config",
    "Predictor": "mambavision.inference.predictor",
    "create_model": "mambavision.factory",
    "list_models": "mambavision.factory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
