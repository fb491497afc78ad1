"""Parameters and multiply-adds of a network, layer by layer, by running it once; on the meta device that costs nothing.

Counted are convolutions, linear layers, both matrix products of attention, and the selective scan: for each token,
channel and state the products step * A, (step * x) * B, the decay of the state and C * h, and for each token and
channel step * x and D * x. Not counted, as is usual: biases, norms, activations (the scan's exponential among them),
softmax, residual scales and pooling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mambavision.layers.attention import Attention
from mambavision.layers.mixer import MambaVisionMixer
from mambavision.layers.token_block import TokenBlock
from mambavision.models.backbone import MambaVisionBackbone
from mambavision.models.modes import evaluating

# Multiply-adds of the scan, see above: for each token, channel and state, and for each token and channel.
SCAN_MACS_PER_STATE = 4
SCAN_MACS_PER_CHANNEL = 2


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one module costs for one picture.

    Attributes:
        name: its place in the network, as in the state dict.
        kind: its class.
        output_shape: of one picture.
        parameters: number of parameters.
        macs: multiply-adds.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """What a network costs for one picture of `img_size` (height, width).

    Attributes:
        img_size: height and width in pixels.
        layers: every module that has parameters or multiply-adds of its own; together the whole network.
        blocks: the same summed over each block, the stem, the down-samplings, the norm and the head.
    """

    img_size: tuple[int, int]
    layers: tuple[LayerCost, ...]
    blocks: tuple[LayerCost, ...]

    @property
    def parameters(self) -> int:
        """Parameters of the network."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-adds of one picture."""
        return sum(layer.macs for layer in self.layers)


@torch.inference_mode()
def count_complexity(model: MambaVisionBackbone, img_size: tuple[int, int] | None = None) -> Complexity:
    """Run `model` once, in evaluation mode, on one empty picture and count.

    Args:
        model: the network, on any device; on `meta` neither memory nor arithmetic is spent.
        img_size: height and width in pixels; None takes the size its preprocessing gives.
    """
    height, width = img_size or model.config.preprocessing.img_size
    first = next(model.parameters())
    shapes: dict[str, tuple[int, ...]] = {}
    macs: dict[str, int] = {}

    def record(name: str, module: nn.Module, output: object) -> None:
        if isinstance(output, Tensor):
            shapes[name] = tuple(output.shape)
            macs[name] = _own_macs(module, output)
            if isinstance(module, MambaVisionMixer):  # which multiplies by dt_proj's weight itself
                shapes[f"{name}.dt_proj"] = (*output.shape[:-1], module.dt_proj.out_features)
                macs[f"{name}.dt_proj"] = math.prod(output.shape[:-1]) * module.dt_proj.weight.numel()

    modules = dict(model.named_modules())
    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: record(name, module, output))
        for name, module in modules.items()
    ]
    try:
        with evaluating(model):
            model(torch.zeros(1, model.config.in_chans, height, width, device=first.device, dtype=first.dtype))
    finally:
        for hook in hooks:
            hook.remove()

    every = [
        LayerCost(
            name=name,
            kind=_kind(module),
            output_shape=shapes.get(name, ()),
            parameters=sum(parameter.numel() for parameter in module.parameters(recurse=False)),
            macs=macs.get(name, 0),
        )
        for name, module in modules.items()
    ]
    layers = tuple(layer for layer in every if layer.parameters or layer.macs)
    heads = {layer.name: layer for layer in every}
    return Complexity(img_size=(height, width), layers=layers, blocks=_by_block(layers, heads))


def _own_macs(module: nn.Module, output: Tensor) -> int:
    """Multiply-adds in the module's own forward, those of its children excepted."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return output.numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, Attention):
        _, length, _ = output.shape
        return 2 * output.numel() * length
    if isinstance(module, MambaVisionMixer):
        scanned = output.numel() // 2
        return scanned * (SCAN_MACS_PER_STATE * module.d_state + SCAN_MACS_PER_CHANNEL)
    return 0


def _kind(module: nn.Module) -> str:
    if isinstance(module, TokenBlock):
        return f"TokenBlock, {'scan' if isinstance(module.mixer, MambaVisionMixer) else 'attention'}"
    return type(module).__name__


def _by_block(layers: tuple[LayerCost, ...], heads: dict[str, LayerCost]) -> tuple[LayerCost, ...]:
    groups: dict[str, list[LayerCost]] = {}
    for layer in layers:
        groups.setdefault(_block_name(layer.name), []).append(layer)
    return tuple(
        LayerCost(
            name=name,
            kind=heads[name].kind,
            output_shape=heads[name].output_shape,
            parameters=sum(layer.parameters for layer in members),
            macs=sum(layer.macs for layer in members),
        )
        for name, members in groups.items()
    )


def _block_name(name: str) -> str:
    """`levels.2.blocks.0` for anything inside that block, `levels.2.downsample`, or the first part elsewhere."""
    parts = name.split(".")
    if parts[0] != "levels":
        return parts[0]
    return ".".join(parts[: 4 if parts[2] == "blocks" else 3])
