"""A folded network for an x86 CPU: oneDNN's kernels on weights in its own layout, fused where two meet.

PyTorch's own float32 matrix products go through MKL, which on AMD CPUs runs at half of oneDNN's speed, and lay out a
convolution's weights anew in every call. Here each linear layer and convolution keeps its weights as oneDNN's kernels
read them, takes the activation or the residual sum behind it into the same call, and maps stay channels-last
throughout.
"""

from __future__ import annotations

import copy
import pickle
import platform
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.inference.fuse import FusedMixer
from mambavision.layers.attention import Attention
from mambavision.layers.conv_block import ConvBlock
from mambavision.layers.drop_path import DropPath
from mambavision.layers.stem import Downsample, Stem
from mambavision.layers.token_block import Mlp, TokenBlock
from mambavision.models.backbone import Level, MambaVisionBackbone
from mambavision.ops import selective_scan

# Tokens and pixels that oneDNN lays the weights out for: those of a 224 px picture. Others run too.
_ROWS = 196
_SIDE = 28
# Modules of the network that are still called when weights are packed.
CALLED_WHEN_PACKED: tuple[type, ...] = (Stem, Downsample, TokenBlock, Mlp, Attention, DropPath, nn.Sequential, nn.ReLU)
UNSAVED = (
    "The weights of a network optimised for a CPU are laid out for this machine and can be neither saved nor loaded; "
    "save the model that it was made of, or load into that one."
)


def optimize_for_cpu(
    model: MambaVisionBackbone, *, dtype: torch.dtype = torch.float32, mode: Literal["instant", "full"] = "instant"
) -> nn.Module:
    """The fastest form known here of a network that `mambavision.inference.fuse.fuse` made; `model` stays as it is.

    Args:
        model: what `fuse` returned, on the CPU.
        dtype: float32, bfloat16 or float16; pictures must come in it too. Half precision needs a CPU that has it.
        mode: both pack weights where oneDNN can, which takes no time and is about as fast as compiling, or faster
            (`benchmarks/cpu_formats.py`). Elsewhere `full` is torch.compile with frozen weights, at the first call of
            each shape.

    Returns:
        A module of the interface of `model`, for inference alone. It has no state dict worth saving and no gradients.

    Raises:
        ValueError: another type or mode, or a model that is elsewhere than on the CPU.
    """
    if mode not in ("instant", "full"):
        raise ValueError(f"mode must be 'instant' or 'full', got {mode!r}.")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}.")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise ValueError("The model must be on the CPU; move it there first.")
    fast = copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last)
    if can_pack(dtype):
        with torch.no_grad():
            for module in list(fast.modules()):
                _pack(module)
    elif mode == "full":
        fast.compile(options={"freezing": True})
    return fast


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed kernels take this type on this machine; elsewhere the network runs in PyTorch's own."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def has_fast_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16, and packed kernels that use them.

    oneDNN takes bfloat16 on others too, and is slower there than in float32.
    """
    instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return can_pack(torch.bfloat16) and instructions


class Packed(nn.Module):
    """A layer with its weights in oneDNN's layout, which neither the state dict nor `Module.to` know."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else bias.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        twin = type(self).__new__(type(self))  # weights are shared: they do not change
        twin.__dict__ = self.__dict__.copy()
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        raise pickle.PicklingError(UNSAVED)


class PackedLinear(Packed):
    """activation(linear(x)); the activation is in oneDNN's terms, `none` or `gelu`, in its exact form."""

    def __init__(self, linear: nn.Linear, activation: str = "none") -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS), linear.bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.activation, [], "none")


class PackedConv(Packed):
    """activation(conv(x)), or conv(x) + residual; channels-last whatever comes in."""

    def __init__(self, conv: Any, activation: str = "none", algorithm: str = "") -> None:
        weight, padding, stride, size = conv.weight.detach(), [*conv.padding], [*conv.stride], [_SIDE, _SIDE]
        if weight.dim() == 3:  # tokens are a picture of one column
            weight, padding, stride, size = weight.unsqueeze(-1), [*padding, 0], [*stride, 1], [_ROWS, 1]
        place = (padding, stride, [1, 1], conv.groups)
        shape = [1, conv.in_channels, *size]
        super().__init__(torch.ops.mkldnn._reorder_convolution_weight(weight, *place, shape), conv.bias)
        self.place = place
        self.activation, self.algorithm = activation, algorithm
        # In 16 bits oneDNN 3.12 computes strided convolutions wrongly on CPUs with AMX where the result is one column.
        self.widens = stride[1] > 1 and weight.dtype != torch.float32

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # (batch, channels, H, W) likewise out
        if self.widens and x.shape[3] <= 2:
            return self(F.pad(x, (0, 3 - x.shape[3])))[..., :1]  # of two columns, the first
        x = x.contiguous(memory_format=torch.channels_last)
        place = (self.weight, self.bias, *self.place)
        # PyTorch 2.6 fails to sum maps of a single pixel, and compilers do not know the sum's shape.
        if residual is None or x.shape[2:] == (1, 1) or torch.compiler.is_compiling():
            y = torch.ops.mkldnn._convolution_pointwise(x, *place, self.activation, [], self.algorithm)
            return y if residual is None else y + residual
        return torch.ops.mkldnn._convolution_pointwise.binary(x, residual, *place, "add", 1.0, None, [], None)


class PackedConvBlock(nn.Module):
    """`ConvBlock` in two calls."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1 = PackedConv(block.conv1, "gelu", "tanh")
        self.conv2 = PackedConv(block.conv2)

    def forward(self, x: Tensor) -> Tensor:  # (batch, dim, H, W), the same out
        return self.conv2(self.conv1(x), x)


class PackedMixer(nn.Module):
    """`FusedMixer` on packed weights."""

    def __init__(self, mixer: FusedMixer) -> None:
        super().__init__()
        self.widths = [mixer.channels, mixer.d_state, mixer.d_state]
        self.scan_backend = mixer.scan_backend
        self.in_proj, self.x_proj, self.out_proj = map(PackedLinear, (mixer.in_proj, mixer.x_proj, mixer.out_proj))
        self.conv1d = PackedConv(mixer.conv1d, "swish")
        self._scan = (mixer.A, mixer.D, mixer.dt_bias)

    def forward(self, x: Tensor) -> Tensor:  # (windows, length, dim), the same out
        u = self.conv1d(self.in_proj(x).transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
        x, z = u.chunk(2, dim=-1)  # (windows, length, half) each
        dt, B, C = self.x_proj(x).split(self.widths, dim=-1)
        A, D, dt_bias = self._scan
        y = selective_scan(x, dt, A, B, C, D, dt_bias, backend=self.scan_backend)
        return self.out_proj(torch.cat([y, z], dim=-1))


def _pack(module: Any) -> None:
    """Replace the layers of a module by their packed forms."""
    if isinstance(module, Stem):
        layers = module.conv_down
        for place in (0, 3):  # ReLU stays behind them: oneDNN's makes zeros of NaN
            layers[place] = PackedConv(layers[place])
    elif isinstance(module, Downsample):
        module.reduction[0] = PackedConv(module.reduction[0])
    elif isinstance(module, Level):
        for place, block in enumerate(module.blocks):
            if isinstance(block, ConvBlock):
                module.blocks[place] = PackedConvBlock(block)
    elif isinstance(module, TokenBlock):
        mlp, mixer = cast("Any", module.mlp), cast("Any", module.mixer)
        mlp.fc1, mlp.act, mlp.fc2 = PackedLinear(mlp.fc1, "gelu"), nn.Identity(), PackedLinear(mlp.fc2)
        if isinstance(mixer, FusedMixer):
            module.mixer = PackedMixer(mixer)
        else:
            mixer.qkv, mixer.proj = PackedLinear(mixer.qkv), PackedLinear(mixer.proj)
