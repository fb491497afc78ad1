"""Every variant as a timm model; importing this module registers them.

    import timm
    import mambavision.integrations.timm
    model = timm.create_model("mamba_vision_t.in1k", pretrained=True)

A variant goes by our name and by a lower-case one, where, as timm has it, a tag tells the weights: `mamba_vision_B` is
`mamba_vision_b.in1k`, and `mamba_vision_B_21k`, the same network, `mamba_vision_b.in21k_ft_in1k`. timm builds, adapts
and loads as it does its own models; it has no way to find models of other packages by itself, so import this first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

try:
    import timm  # noqa: F401  (asked for here, so that its absence is one sentence)
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'timm is not installed; run pip install "timm>=1.0.26", or install mambavision[timm].', name="timm"
    ) from error

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from mambavision.config import NUM_LEVELS, VARIANTS, MambaVisionConfig, get_config
from mambavision.factory import adapted_config
from mambavision.models.classifier import MambaVision
from mambavision.weights import WEIGHTS
from mambavision.weights.fetching import say_license
from mambavision.weights.loading import check_fit
from mambavision.weights.reading import FIRST_CONV, HUB_MODEL, weights_within, without_prefixes

POOLS = ("avg", "max", "avgmax", "catavgmax", "")
UNDILATED = ("Unet", "UnetPlusPlus", "FPN", "PSPNet", "MAnet", "Linknet", "UPerNet", "Segformer", "DPT")
TAGS = {"ImageNet-1K": "in1k", "ImageNet-21K, ImageNet-1K": "in21k_ft_in1k", "CIFAR-10": "cifar10"}


class TimmMambaVision(MambaVision):
    """`MambaVision` as timm builds it: from keywords, with a choice of pooling.

    Args:
        cfg: the variant.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the pictures.
        global_pool: `avg` (the paper's), `max`, their mean `avgmax`, both `catavgmax`, or, without a classifier, ``
            for the map itself.
        img_size: side or (height, width) for which windows cover the whole map.
        device: where parameters are made, `meta` included.
        dtype: type of parameters and buffers.
        **config_fields: other fields of `MambaVisionConfig`, for instance `drop_path_rate`.

    Raises:
        TypeError: an argument that does not exist; `output_stride` among them, which decoders ask timm's networks for.
        ValueError: a value out of range.
    """

    def __init__(
        self,
        cfg: MambaVisionConfig,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **config_fields: Any,
    ) -> None:
        if "output_stride" in config_fields:
            raise TypeError(
                f"There is no output_stride={config_fields['output_stride']!r}: the network has a fixed stride of "
                f"{cfg.reductions[-1]} and no dilated form. Of segmentation_models_pytorch, {', '.join(UNDILATED)} "
                f"do without."
            )
        _check_pool(global_pool, num_classes)
        config = adapted_config(cfg, num_classes=num_classes, in_chans=in_chans, img_size=img_size, **config_fields)
        super().__init__(config, device=device, dtype=dtype)
        self.global_pool = _pool_layer(global_pool)
        if self.head_hidden_size != self.num_features:
            super().reset_classifier(num_classes)  # `catavgmax` needs a wider head

    @property
    def in_chans(self) -> int:
        """Channels of the pictures."""
        return self.config.in_chans

    @property
    def pool_type(self) -> str:
        """A name of `POOLS`."""
        return str(self.global_pool.pool_type)

    @property
    def head_hidden_size(self) -> int:
        """Channels of the pooled vector, which enters the classifier."""
        return self.num_features * self.global_pool.feat_mult()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one of `num_classes` outputs, 0 for none, and the pooling where one is given."""
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        _check_pool(pool, num_classes)
        self.global_pool = _pool_layer(pool)
        super().reset_classifier(num_classes)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As `MambaVision` does it; without a head there is no pooling either."""
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if isinstance(self.head, nn.Identity):
            self.global_pool = _pool_layer("")
        return taken

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As PyTorch does it, for names with the prefix of a wrapper as well, such as the public repositories'."""
        return super().load_state_dict(without_prefixes(dict(state_dict)), strict=strict, assign=assign)

    def _pool(self, x: Tensor) -> Tensor:
        return self.global_pool(x)


class FeatureMaps(FeatureGetterNet):
    """timm's module around a network whose output is a list of feature maps.

    `return_layers`, names of modules, chooses others of the kept levels' maps than `out_indices` did; transformers'
    `TimmBackbone` sets it for `output_hidden_states`.
    """

    model: Any
    out_indices: Any  # levels, or how many of the last
    return_layers: Mapping[str, str] | None = None

    def forward(self, x: Tensor) -> list[Tensor]:  # (batch, in_chans, H, W)
        indices = self.out_indices
        if self.return_layers is not None:  # names, in the order of the output
            kept = [entry["module"] for entry in self.feature_info.info[: len(self.model.levels)]]
            indices = [kept.index(module) for module in self.return_layers if module in kept]
        return self.model.forward_intermediates(
            x, indices=indices, norm=self.norm, output_fmt=self.output_fmt, intermediates_only=True
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward instead of keeping them."""
        self.model.set_grad_checkpointing(enable)


def checkpoint_filter_fn(content: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A weight file's content under the names of `model`, once it is sure that it fits.

    timm calls it before it adapts the first convolution and the head; where the head is replaced it would accept that
    other tensors are missing.

    Raises:
        CheckpointError: listing the names that are missing, unexpected or of another shape.
    """
    weights = without_prefixes(weights_within(content, path="The checkpoint"))
    own = model.state_dict()
    body, given = (
        {name: t for name, t in tensors.items() if not name.startswith("head.")} for tensors in (own, weights)
    )
    if FIRST_CONV in given:
        given[FIRST_CONV] = own[FIRST_CONV]
    check_fit(type(model).__name__, body, given)
    return weights


def _check_pool(global_pool: str, num_classes: int) -> None:
    if global_pool not in POOLS:
        raise ValueError(f"global_pool must be one of {', '.join(map(repr, POOLS))}, got {global_pool!r}.")
    if not global_pool and num_classes:
        raise ValueError(f"Without pooling there is no classifier: pass num_classes=0, not {num_classes}.")


def _pool_layer(pool_type: str) -> SelectAdaptivePool2d:
    return SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))


def _create(name: str, variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Have timm build `variant`, registered as `name`."""
    config = get_config(variant)
    model = build_model_with_cfg(
        TimmMambaVision,
        name,
        pretrained,
        model_cfg=config,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(NUM_LEVELS)), "feature_cls": FeatureMaps},
        **kwargs,
    )
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]  # modules have more than mypy knows
    if kwargs.get("img_size") is not None:  # so that timm.data prepares pictures of that size
        cfg.update(_sizes(adapted_config(config, img_size=kwargs["img_size"], in_chans=cfg["input_size"][0])))
    if pretrained:
        _say_license_of(cfg)
        for module in model.modules():
            # A mark of transformers', whose TimmBackbone resets the statistics of batch norms without it.
            module._is_hf_initialized = True  # type: ignore[assignment]
    return model


def _say_license_of(cfg: Mapping[str, Any]) -> None:
    """Log the license of the weights that timm loaded, when they are the published ones."""
    if not cfg.get("file") and not cfg.get("state_dict"):
        for spec in WEIGHTS.values():
            if spec.repo_id is not None and spec.repo_id == cfg.get("hf_hub_id"):
                say_license(spec)


def _sizes(config: MambaVisionConfig) -> dict[str, Any]:
    """Fields of timm's for the size of the pictures and of the map that is pooled."""
    size = config.preprocessing.img_size
    last = tuple(-(-side // config.reductions[-1]) for side in size)
    return {"input_size": (config.in_chans, *size), "pool_size": last}


def _pretrained_cfg(variant: str) -> PretrainedCfg:
    """What timm knows of a variant's weights: source, preprocessing, parts to adapt, license."""
    config, spec = VARIANTS[variant], WEIGHTS.get(variant)
    preprocessing = config.preprocessing
    weights: dict[str, Any] = {}
    if spec is not None:
        weights = {
            "license": spec.license.lower(),
            "origin_url": spec.url,
            "description": f"MambaVision trained on {spec.trained_on}.",
            "label_names": spec.class_names,
        }
        if spec.repo_id is not None:
            weights |= {"hf_hub_id": spec.repo_id, "hf_hub_filename": HUB_MODEL}
        elif spec.asset.is_file():
            weights["file"] = str(spec.asset)
    return PretrainedCfg(
        **_sizes(config),
        num_classes=config.num_classes,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        mean=preprocessing.mean,
        std=preprocessing.std,
        first_conv=FIRST_CONV.removesuffix(".weight"),
        classifier="head",
        paper_name="MambaVision: A Hybrid Mamba-Transformer Vision Backbone",
        paper_ids="arXiv:2407.08083",
        **weights,
    )


def _registered() -> tuple[dict[str, str], dict[str, dict[str, Any] | PretrainedCfg]]:
    """Name -> variant that is built, and name, with its tag -> weights; a name's first tag is its default."""
    built: dict[str, str] = {}
    cfgs: dict[str, dict[str, Any] | PretrainedCfg] = {}
    for variant in VARIANTS:
        name = variant.lower().removesuffix("_21k")
        tag = f".{TAGS[WEIGHTS[variant].trained_on]}" if variant in WEIGHTS else ""
        built.setdefault(name, variant)
        cfgs[f"{name}{tag}"] = _pretrained_cfg(variant)
        if variant != name:
            built[variant] = variant
            cfgs[variant] = _pretrained_cfg(variant)
    return built, cfgs


def _register(name: str, variant: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, variant, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{variant} by timm's arguments, see `timm.create_model`."
    globals()[name] = register_model(create)


_BUILT, _CFGS = _registered()
default_cfgs = generate_default_cfgs(_CFGS)  # the name under which timm looks for them
for _name, _variant in _BUILT.items():
    _register(_name, _variant)
