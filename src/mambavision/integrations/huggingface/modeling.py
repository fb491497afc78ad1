"""The network as transformers' models: bare, with its classifier, and as a backbone of feature maps.

Each holds the network under `model`, so the names in the state dict are those of the public repositories
(`model.levels.0...`) in all three, and a checkpoint of one loads into the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput, ModelOutput

from mambavision.config import NUM_LEVELS
from mambavision.integrations.huggingface.configuration import MambaVisionConfig
from mambavision.layers.attention import Attention
from mambavision.layers.conv_block import ConvBlock
from mambavision.layers.mixer import MambaVisionMixer
from mambavision.layers.token_block import TokenBlock
from mambavision.models.backbone import MambaVisionBackbone as BackboneNetwork
from mambavision.models.backbone import init_linear
from mambavision.models.classifier import MambaVision

try:
    from transformers.backbone_utils import BackboneMixin
except ImportError:  # transformers 4
    from transformers.utils.backbone_utils import BackboneMixin

Result = TypeVar("Result")


@dataclass
class MambaVisionModelOutput(ModelOutput):
    """What `MambaVisionModel` returns; unpacks into (pooler_output, hidden_states), as the public model's tuple does.

    Attributes:
        pooler_output: the average of `last_hidden_state` over the picture, (batch, hidden_size).
        hidden_states: the four maps, each taken at the end of a level before its down-sampling and before the final
            norm, (batch, channels, height, width).
        last_hidden_state: the last map after the final norm, (batch, hidden_size, rows, columns).
        attentions: on demand, weights of each self-attention in order, (batch * windows, heads, length, length).
    """

    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    last_hidden_state: Tensor | None = None
    attentions: tuple[Tensor, ...] | None = None

    def __iter__(self) -> Iterator[Any]:
        # Keys, by which a dictionary iterates, are what keys() and items() give; nothing unpacks into them.
        return iter((self.pooler_output, self.hidden_states))


class MambaVisionPreTrainedModel(PreTrainedModel):
    """What the three models share: initialisation, attention, checkpointing of activations."""

    config_class = MambaVisionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["Stem", "ConvBlock", "TokenBlock", "Downsample"]
    _fused_attn = True  # of the network's layers

    model: BackboneNetwork

    def post_init(self) -> None:
        """Initialise what no checkpoint brings, and choose the attention."""
        super().post_init()
        self._choose_attention()

    def get_input_embeddings(self) -> nn.Module:
        """The stem: what the first trainable activations come from."""
        return self.model.patch_embed

    @property
    def gradient_checkpointing(self) -> bool:
        """Each block's activations are recomputed in the backward; always without re-entrance."""
        return bool(self.model.levels[0].grad_checkpointing)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.model.set_grad_checkpointing(enable)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The network's own start for what a checkpoint did not bring, module by module."""
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if isinstance(module, MambaVisionMixer):
            own.append(module.dt_proj.bias)
        kept = [(tensor, tensor.clone()) for tensor in own if getattr(tensor, "_is_hf_initialized", False)]
        if len(kept) == len(own):
            return
        if isinstance(module, nn.Linear):
            init_linear(module)
        elif isinstance(module, MambaVisionMixer):
            module.init_scan_parameters()
        elif isinstance(module, (ConvBlock, TokenBlock)):
            convolutional = isinstance(module, ConvBlock)
            for gamma in own:
                gamma.fill_(self.config.layer_scale_conv if convolutional else self.config.layer_scale)
        elif hasattr(module, "reset_parameters"):  # convolutions and norms start as PyTorch's do
            module.reset_parameters()  # type: ignore[operator]
        # Others have come in from outside with their values, as the frozen norms of a detector have.
        for tensor, value in kept:
            tensor.copy_(value)

    def _pictures(self, pixel_values: Tensor | None) -> Tensor:
        """The input in the weights' type, as pipelines and mixed precision expect; anything else is the network's."""
        if pixel_values is None:
            raise ValueError("Give pixel_values, (batch, channels, height, width).")
        return pixel_values.to(self.dtype) if pixel_values.is_floating_point() else pixel_values

    def _choose_attention(self) -> None:
        """Give every layer the attention of the configuration, which whoever holds this model may have changed."""
        fused = self.config._attn_implementation != "eager"
        if fused == self._fused_attn:
            return
        for layer in self._attention_layers():
            layer.fused_attn = fused
        self._fused_attn = fused

    def _attention_layers(self) -> list[Attention]:
        return [module for module in self.model.modules() if isinstance(module, Attention)]

    def _run(
        self, network: Callable[[Tensor], Result], pixel_values: Tensor | None, output_attentions: bool | None
    ) -> tuple[Result, tuple[Tensor, ...] | None]:
        """The result of `network` for the pictures and, if asked for, the weights of each attention in order."""
        pictures = self._pictures(pixel_values)
        self._choose_attention()
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if not output_attentions:
            return network(pictures), None
        if self._fused_attn:
            raise ValueError(
                f"attn_implementation {self.config._attn_implementation!r} does not form the weights that "
                f'output_attentions asks for; call set_attn_implementation("eager"), or load the model with it.'
            )
        weights: list[Tensor] = []
        hooks = [
            layer.attn_drop.register_forward_hook(lambda _module, _inputs, output: weights.append(output))
            for layer in self._attention_layers()
        ]
        try:
            return network(pictures), tuple(weights)
        finally:
            for hook in hooks:
                hook.remove()


class MambaVisionModel(MambaVisionPreTrainedModel):
    """Picture in, pooled vector and feature maps out."""

    model: MambaVision
    _keys_to_ignore_on_load_unexpected = [r"^model\.head\."]

    def __init__(self, config: MambaVisionConfig) -> None:
        super().__init__(config)
        self.model = MambaVision(config.network_config())
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,  # noqa: ARG002  (they are what the model is for)
        return_dict: bool | None = None,
    ) -> MambaVisionModelOutput | tuple[Any, ...]:
        """Pooled vector and maps of pictures of any size.

        Args:
            pixel_values: normalised pictures, (batch, channels, height, width), floating point.
            output_attentions: return the attention weights; needs `attn_implementation="eager"`.
            output_hidden_states: taken for uniformity; the maps are returned in any case.
            return_dict: False for a plain tuple.

        Raises:
            ValueError: no or wrong pictures, or attention weights asked of an implementation that forms none.
        """
        (final, maps), attentions = self._run(self.model.forward_intermediates, pixel_values, output_attentions)
        output = MambaVisionModelOutput(
            pooler_output=self.model.forward_head(final, pre_logits=True),
            hidden_states=tuple(maps),
            last_hidden_state=final,
            attentions=attentions,
        )
        return output if _as_dict(return_dict, self.config) else output.to_tuple()


class MambaVisionForImageClassification(MambaVisionPreTrainedModel):
    """Picture in, logits out; with labels the loss of the configuration's `problem_type` too."""

    model: MambaVision

    def __init__(self, config: MambaVisionConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MambaVision(config.network_config(num_classes=config.num_labels))
        self.post_init()

    @classmethod
    def from_network(cls, network: MambaVision) -> MambaVisionForImageClassification:
        """A network of ours, weights, preprocessing and labels included, as transformers' model; memory is shared."""
        with torch.device("meta"):
            model = cls(MambaVisionConfig.from_network_config(network.config))
        model.model = network
        return model.train(network.training)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Logits of pictures of any size.

        Args:
            pixel_values: normalised pictures, (batch, channels, height, width), floating point.
            labels: (batch,) class indices; floats (batch, num_labels) for several labels a picture; or targets of a
                regression. What they are decides the loss, unless `problem_type` does.
            output_attentions: return the attention weights; needs `attn_implementation="eager"`.
            output_hidden_states: return the four maps.
            return_dict: False for a plain tuple.

        Returns:
            `loss` if there are labels, `logits` (batch, num_labels), and `hidden_states` and `attentions` on demand.

        Raises:
            ValueError: no or wrong pictures, or attention weights asked of an implementation that forms none.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        (final, maps), attentions = self._run(self.model.forward_intermediates, pixel_values, output_attentions)
        logits = self.model.forward_head(final)
        output = ImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=tuple(maps) if output_hidden_states else None,
            attentions=attentions,
        )
        return output if _as_dict(return_dict, self.config) else output.to_tuple()


class MambaVisionBackbone(BackboneMixin, MambaVisionPreTrainedModel):
    """Picture in, feature maps of `config.out_features` out, for detection and segmentation."""

    has_attentions = True
    _keys_to_ignore_on_load_unexpected = [r"^model\.(norm|head)\."]

    def __init__(self, config: MambaVisionConfig) -> None:
        super().__init__(config)
        if hasattr(self, "_init_backbone"):  # transformers 4; 5 does it in the constructor
            self._init_backbone(config)
        self.num_features = [config.dim, *config.hidden_sizes]  # a stage
        self.model = BackboneNetwork(config.network_config())
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple[Any, ...]:
        """Feature maps of pictures of any size; levels behind the last one asked for are not computed.

        Args:
            pixel_values: normalised pictures, (batch, channels, height, width), floating point.
            output_hidden_states: return the maps of all `stage_names`, the stem's first.
            output_attentions: return the attention weights; needs `attn_implementation="eager"`.
            return_dict: False for a plain tuple.

        Raises:
            ValueError: wrong pictures, or attention weights asked of an implementation that forms none.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        taken = [self.stage_names.index(name) for name in self.out_features]
        last = NUM_LEVELS - 1 if output_hidden_states else max(*taken, 1) - 1
        forward = partial(self.model.forward_stages, last=last)
        stages, attentions = self._run(forward, pixel_values, output_attentions)
        output = BackboneOutput(
            feature_maps=tuple(stages[index] for index in taken),
            hidden_states=tuple(stages) if output_hidden_states else None,
            attentions=attentions,
        )
        return output if _as_dict(return_dict, self.config) else output.to_tuple()


def _as_dict(return_dict: bool | None, config: MambaVisionConfig) -> bool:
    return config.return_dict if return_dict is None else return_dict
