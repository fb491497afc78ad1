"""Registration with transformers' Auto classes, and the three cases that registration alone does not reach.

The public repositories carry code of their own (`auto_map`) and no `preprocessor_config.json`. With
`trust_remote_code=True` transformers before 5.5 runs a repository's code even where a class is registered for its model
type, `AutoImageProcessor` looks for the missing file before it looks for a class, and `AutoBackbone` of transformers 5
asks the hub whether there is such a repository before it looks at a folder or a cache. Three entry points are therefore
wrapped: for repositories of this model type alone, and where transformers itself would do otherwise or fail.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import transformers
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PretrainedConfig,
)
from transformers.utils import CONFIG_NAME

from mambavision.integrations.huggingface.configuration import MambaVisionConfig
from mambavision.integrations.huggingface.image_processing import IMAGE_PROCESSORS
from mambavision.integrations.huggingface.modeling import (
    MambaVisionBackbone,
    MambaVisionForImageClassification,
    MambaVisionModel,
)

# Since then a registered class goes before a repository's code.
LOCAL_CODE_FIRST = (5, 5)
# Since then AutoBackbone takes what the hub does not know, folders included, for a name of timm's.
BACKBONES_OF_THE_HUB = (5, 0)


def register() -> None:
    """Make `AutoConfig`, `AutoModel`, `AutoBackbone` and the others know the model type `mambavision`."""
    AutoConfig.register(MambaVisionConfig.model_type, MambaVisionConfig, exist_ok=True)
    AutoModel.register(MambaVisionConfig, MambaVisionModel, exist_ok=True)
    AutoModelForImageClassification.register(MambaVisionConfig, MambaVisionForImageClassification, exist_ok=True)
    AutoBackbone.register(MambaVisionConfig, MambaVisionBackbone, exist_ok=True)
    AutoImageProcessor.register(
        MambaVisionConfig,
        slow_image_processor_class=IMAGE_PROCESSORS["pil"],
        fast_image_processor_class=IMAGE_PROCESSORS["torchvision"],
        exist_ok=True,
    )
    _wrap(AutoImageProcessor, _image_processor_without_its_file)
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < LOCAL_CODE_FIRST:
        _wrap(AutoConfig, _config_of_ours)
    if version >= BACKBONES_OF_THE_HUB:
        _wrap(AutoBackbone, _backbone_of_ours)


def _wrap(auto_class: Any, replacement: Callable[..., Any]) -> None:
    """Put `replacement(original, name, ...)` in the place of `auto_class.from_pretrained`, once."""
    original = auto_class.from_pretrained
    if original.__module__ == __name__:
        return

    @functools.wraps(original)
    def from_pretrained(_cls: type, name: Any, *inputs: Any, **kwargs: Any) -> Any:
        return replacement(original, name, *inputs, **kwargs)

    from_pretrained.__module__ = __name__
    auto_class.from_pretrained = classmethod(from_pretrained)


def _image_processor_without_its_file(original: Callable[..., Any], name: Any, *inputs: Any, **kwargs: Any) -> Any:
    try:
        return original(name, *inputs, **kwargs)
    except OSError:  # no preprocessor_config.json
        if not _is_ours(name, kwargs):
            raise
    return original(name, *inputs, image_processor_filename=CONFIG_NAME, **kwargs)


def _config_of_ours(original: Callable[..., Any], name: Any, *inputs: Any, **kwargs: Any) -> Any:
    if kwargs.get("trust_remote_code") and _is_ours(name, kwargs):
        kwargs["trust_remote_code"] = False
    return original(name, *inputs, **kwargs)


def _backbone_of_ours(original: Callable[..., Any], name: Any, *inputs: Any, **kwargs: Any) -> Any:
    # Whether by what lies here alone: what does not is transformers' to ask for, and comes to our class from there.
    if not _is_ours(name, {**kwargs, "local_files_only": True}):
        return original(name, *inputs, **kwargs)
    for handled_before in ("use_timm_backbone", "code_revision"):  # by Auto classes, unknown to models
        kwargs.pop(handled_before, None)
    return MambaVisionBackbone.from_pretrained(name, *inputs, **kwargs)


def _is_ours(name: Any, kwargs: dict[str, Any]) -> bool:
    try:
        fields, _ = PretrainedConfig.get_config_dict(name, **kwargs)
    except OSError:  # no config.json either
        return False
    return fields.get("model_type") == MambaVisionConfig.model_type
