"""The folded network from fused GPU kernels: same parameters, same function, a fraction of the launches and bytes.

`use_kernels` replaces the parts of a network that `fuse` has folded. Each new part computes through the ops of
`mambavision.ops`, which choose their implementation, so that it also runs, slowly, where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mambavision.inference.aligned import AlignedConv, AlignedLinear, padded
from mambavision.inference.exact import CastWithExact
from mambavision.inference.float8 import Float8ConvBlocks, Float8Products
from mambavision.inference.fuse import FusedMixer
from mambavision.layers.attention import Attention
from mambavision.layers.conv_block import ConvBlock
from mambavision.layers.stem import Downsample, Stem
from mambavision.layers.token_block import TokenBlock
from mambavision.models.backbone import Level, MambaVisionBackbone
from mambavision.ops import selective_scan, selective_scan_
from mambavision.ops.conv3x3 import conv3x3
from mambavision.ops.hopper import attention_op as hopper
from mambavision.ops.layer_norm import layer_norm, layer_norm_and_sum, layer_norm_of_sum_
from mambavision.ops.linear import linear, linear_with_moments
from mambavision.ops.precision import FLOAT8, HALVES
from mambavision.ops.stem import stem
from mambavision.ops.token_conv import token_conv
from mambavision.ops.window_attention import MOST_TOKENS, SHORT_WINDOW, TRAINING_BACKENDS, window_attention

CHANNEL_UNIT, FLOAT8_UNIT = 16, 32  # 32 bytes, what a GPU reads of its memory at once, in 16 and in 8 bits
HEAD_UNIT = 8  # to multiples of which attention's kernels take the width of a head
# Rows of tokens times the square of their channels, so multiply-adds, up to which one kernel a layer, norm and residual
# included, beats the library's product with kernels for what surrounds it.
FEW_WORK = 80 * 2**20
FLOAT8_ROWS = 768  # rows of tokens, of all windows, from which rounding to 8 bits costs less than its products gain
MANY_WINDOWS = 24  # of more than SHORT_WINDOW tokens, from which the Hopper kernel's attention or cuDNN's is faster


def use_kernels(fused: MambaVisionBackbone, *, float8: bool = False) -> None:
    """Replace the parts of `fused`, which `fuse` has made, by parts that use the kernels.

    Args:
        fused: the folded network, not yet in half precision.
        float8: whether convolutions, and linear layers of many tokens, multiply in 8 bits.
    """
    unit = FLOAT8_UNIT if float8 else CHANNEL_UNIT
    levels = cast("Sequence[Any]", fused.levels)
    widths = [
        channels if level.window_size is not None else -(-channels // unit) * unit
        for level, channels in zip(levels, fused.config.channels, strict=False)  # levels may have been pruned
    ]
    cast("Any", fused).patch_embed = KernelStem(fused.patch_embed, widths[0])
    for level, width, channels, following in zip(
        levels, widths, fused.config.channels, [*widths[1:], None], strict=False
    ):
        if level.window_size is None and float8:
            level.blocks = nn.ModuleList([Float8ConvBlocks(level.blocks, width)])
        elif level.window_size is None:
            level.blocks = nn.ModuleList(KernelConvBlock(block, width) for block in level.blocks)
        else:
            level.blocks = nn.ModuleList([KernelTokens(level, channels, float8=float8)])
        if level.downsample is not None:
            level.downsample = KernelDownsample(level.downsample, width, cast("int", following))


class KernelStem(nn.Module):
    """`Stem` in one kernel or two, for pictures of any floating type, with `width` output channels."""

    def __init__(self, folded: Stem, width: int) -> None:
        super().__init__()
        first, _, _, second, *_ = cast("Any", folded.conv_down)
        self.conv_down = nn.ModuleList([first, padded(second, second.in_channels, width)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = cast("Any", self.conv_down)
        strides = (first.stride[0], second.stride[0])
        return stem(x, first.weight, first.bias, second.weight, second.bias, strides=strides)


class KernelConvBlock(nn.Module):
    """`ConvBlock` in two kernels, on maps of `width` channels."""

    def __init__(self, folded: ConvBlock, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (AlignedConv(conv, width, width) for conv in (folded.conv1, folded.conv2))

    def forward(self, x: Tensor) -> Tensor:  # (batch, width, H, W), the same out
        branch = conv3x3(x, self.conv1.weight, self.conv1.bias, activation="gelu_tanh")
        return conv3x3(branch, self.conv2.weight, self.conv2.bias, residual=x)


class KernelDownsample(nn.Module):
    """`Downsample` in one kernel, from maps of `width` channels to maps of `following`."""

    def __init__(self, layer: Downsample, width: int, following: int) -> None:
        super().__init__()
        self.reduction = AlignedConv(cast("Any", layer.reduction)[0], width, following)

    def forward(self, x: Tensor) -> Tensor:  # (batch, width, H, W) -> (batch, following, ceil(H / 2), ceil(W / 2))
        return conv3x3(x, self.reduction.weight, stride=2)


class KernelTokens(nn.Module):
    """All blocks of a window level, on its windows of tokens.

    Few tokens go block by block through kernels that take norm and residual along. Many go through products without
    norms, and those that end a branch are added to the residual stream in place, but without biases. These are
    constant: all of them are added at the start, beside the first norm, and each later norm takes off those that are
    not due yet. In 8 bits it is the same, but for the MLP's share, which the next norm adds.
    """

    early: Tensor

    def __init__(self, level: Level, channels: int, *, float8: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(KernelTokenBlock(cast("TokenBlock", block)) for block in level.blocks)
        self.float8 = float8 and all(block.add_float8() for block in cast("Sequence[KernelTokenBlock]", self.blocks))
        self.register_buffer("early", torch.zeros(channels, device=next(level.parameters()).device))

    def round_constants(self) -> None:
        """Form what is constant anew, from weights and biases as the type that they now have rounds them."""
        dtype = self.early.dtype
        blocks = cast("Sequence[KernelTokenBlock]", self.blocks)
        total = sum(block.sum_biases() for block in blocks)
        self.early = cast("Tensor", total).to(dtype)
        early = self.early.double()
        for block in blocks:
            early = block.take_off(early)

    def forward(self, x: Tensor) -> Tensor:  # (windows, length, channels), the same out
        windows, length, channels = x.shape
        if self.float8 and windows * length >= FLOAT8_ROWS and x.dtype in HALVES and not _differentiated(x):
            return self._in_float8(x)
        if takes_few(x):
            moments = None
            for block in self.blocks:
                x, moments = block(x, moments)
            return x
        blocks = cast("Sequence[KernelTokenBlock]", self.blocks)
        normed, x = layer_norm_and_sum(x.reshape(-1, channels), self.early, eps=blocks[0].eps)
        for block in blocks:  # x, (rows, channels), is changed in place
            block.add_to(x, length, normed if block is blocks[0] else layer_norm(x, block.early1, eps=block.eps))
        return x.view(windows, length, channels)

    def _in_float8(self, x: Tensor) -> Tensor:
        """The same; products in 8 bits cannot add to the stream, so the next norm does it before its own work."""
        windows, length, channels = x.shape
        blocks = cast("Sequence[KernelTokenBlock]", self.blocks)
        normed, x = layer_norm_and_sum(x.reshape(-1, channels), self.early, eps=blocks[0].eps, dtype=FLOAT8)
        share = blocks[0].add_in_float8(x, length, normed)
        for block in blocks[1:]:
            normed = layer_norm_of_sum_(x, share, block.early1, eps=block.eps, dtype=FLOAT8)
            share = block.add_in_float8(x, length, normed)
        return x.add_(share).view(windows, length, channels)


def _differentiated(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def takes_few(x: Tensor) -> bool:
    """Whether tokens x, (windows, length, channels), go block by block."""
    windows, length, channels = x.shape
    if not x.is_cuda or _differentiated(x):
        return True
    return windows * length * channels**2 <= FEW_WORK


class KernelTokenBlock(CastWithExact):
    """`TokenBlock` through fused kernels; see `KernelTokens` for its ways."""

    exact = ("sum1", "sum2", "early1", "early2")
    sum1: Tensor
    sum2: Tensor
    early1: Tensor
    early2: Tensor

    def __init__(self, block: TokenBlock) -> None:
        super().__init__()
        mixer = block.mixer
        self.mixer = KernelMixer(mixer) if isinstance(mixer, FusedMixer) else KernelAttention(cast("Attention", mixer))
        self.eps = block.norm1.eps
        self.fc1, self.fc2 = AlignedLinear(block.mlp.fc1), block.mlp.fc2
        for name in self.exact:
            self.register_buffer(name, None)
        self.products: Float8Products | None = None

    def add_float8(self) -> bool:
        """Have products in 8 bits as well; whether that is possible."""
        layers = self.mixer.first, self.fc1, self.fc2
        if Float8Products.fit(*layers):
            self.products = Float8Products(*layers)
        return self.products is not None

    def sum_biases(self) -> Tensor:
        """All that the block's biases add to the stream, float64."""
        bias = self.mixer.last.bias
        return self.fc2.bias.double() if bias is None else bias.double() + self.fc2.bias.double()

    def take_off(self, early: Tensor) -> Tensor:
        """Note for the norms what the stream holds too early before the block; returns what it does behind it."""
        self.sum1, self.sum2 = self.mixer.first.weight.float().sum(1), self.fc1.weight.float().sum(1)
        self.early1 = -early.float()
        if self.mixer.last.bias is not None:
            early = early - self.mixer.last.bias.double()
        self.early2 = -early.float()
        return early - self.fc2.bias.double()

    def forward(self, x: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """On x (windows, length, dim), and what is known of its moments; returns both anew."""
        first, last = self.mixer.first, self.mixer.last
        u = linear(x, first.weight, first.bias, norm_eps=self.eps, weight_sum=self.sum1, moments=moments)
        x, moments = _added(self.mixer(u), last, x)
        hidden = linear(
            x,
            self.fc1.weight,
            self.fc1.bias,
            norm_eps=self.eps,
            weight_sum=self.sum2,
            moments=moments,
            activation="gelu",
        )
        return _added(hidden, self.fc2, x)

    def add_to(self, x: Tensor, length: int, normed: Tensor) -> None:
        """The same on the stream x (rows, dim), in place; its biases are there already. `normed`: its first norm."""
        first, last = self.mixer.first, self.mixer.last
        u = linear(normed, first.weight, first.bias)
        mixed = self.mixer(u.view(-1, length, u.shape[1]))
        x.addmm_(mixed.reshape(x.shape[0], -1), last.weight.t())
        normed = layer_norm(x, self.early2, eps=self.eps)
        # The tanh form is within 5e-4 of GELU. A GPU's products have it at their end, some by a unit for tanh, and then
        # with an error of up to 2^-12 of what comes in.
        hidden = linear(normed, self.fc1.weight, self.fc1.bias, activation="gelu_tanh" if x.is_cuda else "gelu")
        x.addmm_(hidden, self.fc2.weight.t())

    def add_in_float8(self, x: Tensor, length: int, normed: Tensor) -> Tensor:
        """Like `add_to`, with `normed` in 8 bits; the MLP's share is not added but returned."""
        products = cast("Float8Products", self.products)
        u = products.first(normed, x.dtype)
        mixed = self.mixer(u.view(-1, length, u.shape[1]))
        x.addmm_(mixed.reshape(x.shape[0], -1), self.mixer.last.weight.t())
        normed = layer_norm(x, self.early2, eps=self.eps, dtype=FLOAT8)
        return cast("Tensor", products.fc2(products.fc1(normed, x.dtype, activation="gelu_tanh"), x.dtype))


def _added(x: Tensor, layer: nn.Linear, stream: Tensor) -> tuple[Tensor, Tensor | None]:
    """The layer's share added to the stream, and the sum's moments where a kernel gives them."""
    if not x.is_cuda or _differentiated(x) or x.dtype not in HALVES:
        return linear(x, layer.weight, layer.bias, residual=stream), None
    return linear_with_moments(x, layer.weight, layer.bias, residual=stream)


class KernelMixer(CastWithExact):
    """`FusedMixer` between its projections: the convolutions and the scan, which writes where it read."""

    exact = ("A", "D", "dt_bias")
    A: Tensor
    D: Tensor
    dt_bias: Tensor

    def __init__(self, mixer: FusedMixer) -> None:
        super().__init__()
        self.first, self.last = AlignedLinear(mixer.in_proj), mixer.out_proj
        self.channels, self.d_state = mixer.channels, mixer.d_state
        self.x_proj = mixer.x_proj
        self.conv = nn.Parameter(mixer.conv1d.weight.detach().squeeze(1), requires_grad=False)  # (dim, kernel)
        for name in self.exact:
            self.register_buffer(name, getattr(mixer, name))

    def forward(self, u: Tensor) -> Tensor:  # (windows, length, dim), the same out
        u = token_conv(u, self.conv)
        x = u[..., : self.channels]
        dt, B, C = F.linear(x, self.x_proj.weight).split([self.channels, self.d_state, self.d_state], dim=-1)
        if _differentiated(u):  # nothing may be overwritten
            y = selective_scan(x, dt, self.A, B, C, self.D, self.dt_bias)
            return torch.cat([y, u[..., self.channels :]], dim=-1)
        selective_scan_(x, dt, self.A, B, C, self.D, self.dt_bias)
        return u


class KernelAttention(nn.Module):
    """`Attention` between its projections, with heads padded to a width that the fused kernels take."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        width = attention.proj.in_features // self.num_heads
        self.scale = width**-0.5
        self.width = -(-width // HEAD_UNIT) * HEAD_UNIT
        first, last = attention.qkv, attention.proj
        if self.width != width:
            first, last = self._pad_heads(first, last, width)
        self.first, self.last = AlignedLinear(first), last

    def _pad_heads(self, before: nn.Linear, behind: nn.Linear, width: int) -> tuple[nn.Linear, nn.Linear]:
        """The projections with zeros between the heads."""
        heads, more = self.num_heads, self.width - width
        dim = before.in_features
        first = nn.Linear(dim, 3 * heads * self.width, device="meta")
        weight = F.pad(before.weight.detach().view(3 * heads, width, dim), (0, 0, 0, more))
        first.weight = nn.Parameter(weight.reshape(-1, dim), requires_grad=False)
        bias = F.pad(before.bias.detach().view(3 * heads, width), (0, more))
        first.bias = nn.Parameter(bias.reshape(-1), requires_grad=False)
        last = nn.Linear(heads * self.width, dim, device="meta")
        weight = F.pad(behind.weight.detach().view(dim, heads, width), (0, more))
        last.weight = nn.Parameter(weight.reshape(dim, -1), requires_grad=False)
        last.bias = behind.bias
        return first, last

    def forward(self, qkv: Tensor) -> Tensor:  # (windows, length, 3 x channels) -> (windows, length, channels)
        windows, length, _ = qkv.shape
        if windows == 0:  # which not every fused kernel takes
            return qkv[..., : self.num_heads * self.width]
        if length <= (SHORT_WINDOW if windows >= MANY_WINDOWS else MOST_TOKENS):
            return window_attention(qkv, num_heads=self.num_heads, scale=self.scale)
        if hopper.serves(qkv, self.num_heads):
            attended: Tensor = hopper.attention(qkv, self.num_heads, self.scale)
            return attended
        q, k, v = qkv.view(windows, length, 3, self.num_heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        with _fastest_attention(q):
            x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)  # (windows, heads, length, width)
        return x.transpose(1, 2).reshape(windows, length, -1)


def _fastest_attention(q: Tensor) -> AbstractContextManager[None]:
    """PyTorch's backends in the order of their speed for queries (windows, heads, length, width), as measured."""
    windows = q.shape[0]
    if not q.is_cuda or _differentiated(q):
        return sdpa_kernel(TRAINING_BACKENDS) if q.is_cuda else nullcontext()
    if windows < MANY_WINDOWS:
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)
