"""Fold what is constant after training into its neighbours: the same function in fewer operations.

Batch norms go into the convolutions before them, the final one into the head behind the pooling. Layer norms keep their
normalisation and hand scale and shift to the linear layer behind them; layer scale goes into the one before it. A
mixer's projections of the steps become one, and so do its two convolutions over tokens. Products are formed in float64,
so that folding loses nothing that the weights' own type can hold.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from mambavision.inference.exact import CastWithExact
from mambavision.layers.attention import Attention
from mambavision.layers.conv_block import ConvBlock
from mambavision.layers.drop_path import DropPath
from mambavision.layers.mixer import MambaVisionMixer, TokenConv
from mambavision.layers.plain import are_plain, has_own_hooks, has_wrapped_forward
from mambavision.layers.stem import FewChannelConv, Stem
from mambavision.layers.token_block import TokenBlock
from mambavision.models.backbone import MambaVisionBackbone
from mambavision.models.classifier import MambaVision
from mambavision.ops import selective_scan
from mambavision.ops.precision import at_least_float32

Network = TypeVar("Network", bound=MambaVisionBackbone)


def fuse(model: Network) -> Network:
    """A copy of `model` for inference that computes the same with everything folded; `model` itself is left as it is.

    The copy has the interface of `model` and computes as in evaluation mode, whatever mode it is set to; only timm's
    form of a classifier must be left in that mode. Its state dict is its own: save `model` instead.

    Raises:
        TypeError: the model is no network of this package.
        ValueError: the model is on the meta device and so has no weights to fold, or something that would be folded is
            more than its weights: an adapter, a hook, a parametrization, a norm without running statistics.
    """
    check_network(model, "fuse takes a MambaVision network")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("A model on the meta device has no weights to fold; load them first.")
    if has_wrapped_forward(model):
        raise ValueError("The model's forward is wrapped, which would call the model itself; unwrap it first.")
    for name, module in model.named_modules():
        _check_foldable(name, module)
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    fused.__dict__.pop("forward", None)  # its class's own, which would hide that of the class it gets
    for module in list(fused.modules()):
        if isinstance(module, Stem):
            _fuse_stem(module)
        elif isinstance(module, ConvBlock):
            _fuse_conv_block(module)
        elif isinstance(module, TokenBlock):
            _fuse_token_block(module)
        elif isinstance(module, DropPath):
            module.rate = 0.0
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    if type(fused) is MambaVision:
        # The same modules, and a forward pass that goes around the norm.
        fused.__class__ = FusedMambaVision  # type: ignore[assignment]
        cast("FusedMambaVision", fused).fold_head()
    return fused


def check_network(model: object, expected: str) -> MambaVisionBackbone:
    """`model`; TypeError where it is no network of this package: `expected`, as a sentence begins, and a way out."""
    if isinstance(model, MambaVisionBackbone):
        return model
    children = model.named_modules() if isinstance(model, nn.Module) else ()
    name, inner = next(
        ((name, child) for name, child in children if isinstance(child, MambaVisionBackbone)), ("", None)
    )
    hint = "" if inner is None else f": pass its `.{name}`"
    if isinstance(inner, MambaVision) and "feature_info" in vars(model):  # timm's, around a classifier
        hint = ": make it with mambavision.create_model(..., features_only=True) for its feature maps"
    raise TypeError(f"{expected}, got {type(model).__name__}{hint}.")


class FusedMambaVision(MambaVision):
    """A classifier whose final norm is part of its head; `forward_features` still gives the map after the norm.

    Another head or norm can be assigned, with its weights in it: those that are changed in place later are not seen.
    """

    def fold_head(self) -> None:
        """Form the head for a pooled vector that has not passed the norm."""
        head = self.head
        if _is_batch_norm(self.norm) and not has_own_hooks(self.norm) and are_plain(head) and type(head) is nn.Linear:
            head = copy.deepcopy(head)
            _scale_input(head, *_scale_and_shift(self.norm))
            self._head_of_maps: nn.Module | None = head
        else:
            self._head_of_maps = None

    def __setattr__(self, name: str, value: Any) -> None:
        assigned = name in ("head", "norm") and hasattr(self, "_head_of_maps")
        if assigned:
            like = next(chain(self.norm.buffers(), self.parameters()))
            value = value.to(device=like.device, dtype=like.dtype)
        super().__setattr__(name, value)
        if assigned:
            self.fold_head()

    def train(self, mode: bool = True) -> FusedMambaVision:  # noqa: ARG002  (always evaluates)
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # as in `MambaVision`
        if self._head_of_maps is None:
            return super().forward(x)
        maps = self._level_maps(x, last=len(self.levels) - 1)
        return self._head_of_maps(self._pool(maps[-1]))


class FusedMixer(CastWithExact):
    """`MambaVisionMixer` in fewer operations, for inference; see there for what it computes."""

    exact = ("A", "D", "dt_bias")
    A: Tensor
    D: Tensor
    dt_bias: Tensor

    def __init__(self, mixer: MambaVisionMixer) -> None:
        super().__init__()
        half, rank = mixer.D.shape[0], mixer.dt_rank
        self.channels = half
        self.d_state = mixer.d_state
        self.scan_backend = mixer.scan_backend
        self.in_proj = mixer.in_proj
        self.out_proj = mixer.out_proj
        convolutions = torch.cat([mixer.conv1d_x.weight, mixer.conv1d_z.weight])  # (dim, 1, kernel)
        self.conv1d = TokenConv(2 * half, convolutions.shape[-1], device="meta")
        self.conv1d.weight = _constant(convolutions, convolutions.dtype)
        # The steps' low-rank projection multiplied out: steps, B and C come from one product.
        low, states = mixer.x_proj.weight.double().split([rank, 2 * self.d_state])
        weight = torch.cat([mixer.dt_proj.weight.double() @ low, states])  # (half + 2 N, half)
        self.x_proj = nn.Linear(half, weight.shape[0], bias=False, device="meta")
        self.x_proj.weight = _constant(weight, mixer.x_proj.weight.dtype)
        scan = {"A": -mixer.A_log.double().exp(), "D": mixer.D, "dt_bias": 2 * mixer.dt_proj.bias.double()}
        for name, tensor in scan.items():
            wide = at_least_float32(mixer.D.dtype)
            self.register_buffer(name, tensor.detach().to(wide))

    def forward(self, x: Tensor) -> Tensor:  # (windows, length, dim), the same out
        u = self.conv1d(self.in_proj(x))
        x, z = u.chunk(2, dim=-1)  # (windows, length, half) each
        dt, B, C = self.x_proj(x).split([self.channels, self.d_state, self.d_state], dim=-1)
        y = selective_scan(x, dt, self.A, B, C, self.D, self.dt_bias, backend=self.scan_backend)
        return self.out_proj(torch.cat([y, z], dim=-1))


# Whose numbers are rewritten or taken over, of each module.
_WEIGHTS: dict[type[nn.Module], tuple[str, ...]] = {
    Stem: ("conv_down.0", "conv_down.3"),
    ConvBlock: ("conv1", "conv2"),
    TokenBlock: ("norm1", "norm2", "mlp.fc1", "mlp.fc2"),
    Attention: ("qkv", "proj"),
    MambaVisionMixer: ("in_proj", "out_proj", "x_proj", "dt_proj", "conv1d_x", "conv1d_z"),
}
_NORMS: dict[type[nn.Module], tuple[str, ...]] = {
    Stem: ("conv_down.1", "conv_down.4"),
    ConvBlock: ("norm1", "norm2"),
}
_PLAIN = (nn.Linear, nn.Conv2d, nn.LayerNorm, FewChannelConv, TokenConv)


def _check_foldable(name: str, module: nn.Module) -> None:
    """ValueError where folding `module` would lose something."""
    if isinstance(module, MambaVisionMixer) and has_own_hooks(module):
        raise ValueError(f"{name} has a hook, which would not be called any more; remove it first.")
    for part in _WEIGHTS.get(type(module), ()):
        layer = module.get_submodule(part)
        if type(layer) not in _PLAIN or has_own_hooks(layer):
            raise ValueError(
                f"{name}.{part} ({type(layer).__name__}) cannot be folded: merge adapters, make pruning and "
                "parametrizations permanent, and remove hooks first."
            )
    for part in _NORMS.get(type(module), ()):
        norm = module.get_submodule(part)
        if type(norm) is not nn.Identity and (not _is_batch_norm(norm) or has_own_hooks(norm)):
            raise ValueError(
                f"{name}.{part} ({type(norm).__name__}) cannot be folded: only a batch norm with running statistics "
                "and without hooks can."
            )


def _is_batch_norm(norm: nn.Module) -> bool:
    """Whether it scales and shifts by running statistics: PyTorch's, synchronised or not, or a frozen one."""
    frozen = type(norm).__name__ == "FrozenBatchNorm2d"  # torchvision and detection libraries have their own
    known = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) or frozen
    return known and getattr(norm, "running_var", None) is not None and hasattr(norm, "eps")


# Blocks and mixers are `Any` below, since modules are replaced by others.


def _fuse_stem(stem: Any) -> None:
    layers = stem.conv_down
    for place in (0, 3):
        _fold_norm(layers[place], layers[place + 1])
        layers[place + 1] = nn.Identity()


def _fuse_conv_block(block: Any) -> None:
    _fold_norm(block.conv1, block.norm1)
    _fold_norm(block.conv2, block.norm2)
    block.norm1, block.norm2 = nn.Identity(), nn.Identity()
    if block.gamma is not None:
        _scale_output(block.conv2, block.gamma)
        block.gamma = None


def _fuse_token_block(block: Any) -> None:
    mixer, mlp = block.mixer, block.mlp
    if isinstance(mixer, FusedMixer):
        return
    first, last = (mixer.qkv, mixer.proj) if isinstance(mixer, Attention) else (mixer.in_proj, mixer.out_proj)
    block.norm1 = _fold_layer_norm(block.norm1, first)
    block.norm2 = _fold_layer_norm(block.norm2, mlp.fc1)
    if block.gamma_1 is not None:
        _scale_output(last, block.gamma_1)
        _scale_output(mlp.fc2, block.gamma_2)
        block.gamma_1 = block.gamma_2 = None
    if isinstance(mixer, MambaVisionMixer):
        block.mixer = FusedMixer(mixer)


def _fold_norm(conv: nn.Conv2d, norm: nn.Module) -> None:
    """Make `conv` give what `norm` makes of its output."""
    if isinstance(norm, nn.Identity):  # folded before
        return
    scale, shift = _scale_and_shift(norm)
    _scale_output(conv, scale)
    before = 0 if conv.bias is None else conv.bias.double()
    conv.bias = _constant(before + shift, conv.weight.dtype)


def _fold_layer_norm(norm: nn.LayerNorm, linear: nn.Linear) -> nn.LayerNorm:
    """The norm without scale and shift, which `linear` takes over."""
    if not norm.elementwise_affine:
        return norm
    _scale_input(linear, norm.weight.double(), torch.zeros_like(norm.weight) if norm.bias is None else norm.bias)
    return nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """The norm as scale x + shift, in float64."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = norm.weight.double() * scale
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else norm.bias.double() + shift


def _scale_input(linear: nn.Linear, scale: Tensor, shift: Tensor) -> None:
    """Make `linear` of x what it was of scale x + shift."""
    weight, shift = linear.weight.double(), shift.double()
    bias = weight @ shift if linear.bias is None else weight @ shift + linear.bias.double()
    linear.weight = _constant(weight * scale, linear.weight.dtype)
    linear.bias = _constant(bias, linear.weight.dtype)


def _scale_output(layer: nn.Linear | nn.Conv2d, scale: Tensor) -> None:
    """Make `layer` give scale times what it gave."""
    scale = scale.double()
    weight = layer.weight.double() * scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
    layer.weight = _constant(weight, layer.weight.dtype)
    if layer.bias is not None:
        layer.bias = _constant(layer.bias.double() * scale, layer.weight.dtype)


def _constant(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(values.detach().to(dtype), requires_grad=False)
