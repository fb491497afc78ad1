"""MambaVision for Hugging Face transformers, 5 and 4.57: importing this registers it with the Auto classes.

    import mambavision.integrations.huggingface
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained("nvidia/MambaVision-T-1K")

No code of a repository is run.
"""

try:
    import transformers  # noqa: F401  (asked for here, so that its absence is one sentence)
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'transformers is not installed; run pip install "transformers>=4.57", or install mambavision[huggingface].',
        name="transformers",
    ) from error

from mambavision.integrations.huggingface.auto_classes import register
from mambavision.integrations.huggingface.configuration import MambaVisionConfig
from mambavision.integrations.huggingface.image_processing import IMAGE_PROCESSORS, MambaVisionImageProcessor
from mambavision.integrations.huggingface.modeling import (
    MambaVisionBackbone,
    MambaVisionForImageClassification,
    MambaVisionModel,
    MambaVisionModelOutput,
    MambaVisionPreTrainedModel,
)

__all__ = [
    "IMAGE_PROCESSORS",
    "MambaVisionBackbone",
    "MambaVisionConfig",
    "MambaVisionForImageClassification",
    "MambaVisionImageProcessor",
    "MambaVisionModel",
    "MambaVisionModelOutput",
    "MambaVisionPreTrainedModel",
]

register()
