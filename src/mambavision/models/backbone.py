"""MambaVision's four levels and their feature maps (paper, figure 2 and section 3).

Levels 0 and 1 are residual convolutions at high resolution, levels 2 and 3 mix tokens in windows: first by selective
scan, then, in the last half of each level's blocks, by self-attention (paper, section 3.2 and table 5). The names in
the state dict are those of the published weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambavision.config import NUM_LEVELS, MambaVisionConfig
from mambavision.layers.attention import Attention
from mambavision.layers.conv_block import ConvBlock
from mambavision.layers.mixer import MambaVisionMixer
from mambavision.layers.plain import has_hooks
from mambavision.layers.stem import Downsample, Stem
from mambavision.layers.token_block import TokenBlock, run_blocks
from mambavision.layers.window import window_partition, window_reverse
from mambavision.models.modes import recomputing


class Level(nn.Module):
    """Blocks at one resolution; its output is the level's feature map, before any down-sampling.

    `window_size` None makes it convolutional; otherwise the blocks run on windows of tokens.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, downsample: nn.Module | None, window_size: int | None) -> None:
        super().__init__()
        self.window_size = window_size
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample  # run by the backbone

    def forward(self, x: Tensor) -> Tensor:  # (batch, channels, H, W), the same out
        height, width = x.shape[-2:]
        if self.window_size is not None:
            x = window_partition(x, self.window_size)  # (windows, length, channels)
        checkpointing = self.grad_checkpointing and torch.is_grad_enabled()
        if not checkpointing and all(type(block) is TokenBlock and not has_hooks(block) for block in self.blocks):
            x = run_blocks(cast("Iterable[TokenBlock]", self.blocks), x)
        else:
            for block in self.blocks:
                x = _checkpointed(block, x) if checkpointing else block(x)
        if self.window_size is not None:
            x = window_reverse(x, self.window_size, height, width)
        return x


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """The block on x, computed again in the backward. Compiled graphs change buffers in the forward alone."""
    if torch.compiler.is_compiling():
        y = checkpoint(block, x, use_reentrant=False)
    else:
        y = checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputing(block)))
    return cast("Tensor", y)


class FeatureInfo(list[dict[str, Any]]):
    """One entry a feature map with `num_chs`, `reduction` and `module`; the methods are timm's.

    `index`, where it is given, asks for one map or for a list of them, by place among the maps.
    """

    def channels(self, index: int | Sequence[int] | None = None) -> Any:
        """Channels of each map."""
        return self._column("num_chs", index)

    def reduction(self, index: int | Sequence[int] | None = None) -> Any:
        """Input pixels under one side of a cell, each map."""
        return self._column("reduction", index)

    def module_name(self, index: int | Sequence[int] | None = None) -> Any:
        """The module whose output each map is."""
        return self._column("module", index)

    def get_dicts(self, keys: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The entries, with all their keys or with `keys` alone."""
        return [{key: entry[key] for key in keys or entry} for entry in self]

    def _column(self, key: str, index: int | Sequence[int] | None) -> Any:
        if isinstance(index, int):
            return self[index][key]
        return [self[place][key] for place in (range(len(self)) if index is None else index)]


class MambaVisionBackbone(nn.Module):
    """Picture in, feature maps out, each taken at the end of a level before its down-sampling.

    Args:
        config: the network.
        out_indices: levels whose maps `forward` returns, in order; negative ones count from the end.
        device: where parameters are made, `meta` included.
        dtype: type of parameters and buffers.

    Raises:
        ValueError: an index names no level.
    """

    def __init__(
        self,
        config: MambaVisionConfig,
        *,
        out_indices: Sequence[int] = tuple(range(NUM_LEVELS)),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.out_indices = _level_indices(out_indices)
        self.patch_embed = Stem(config.in_chans, config.in_dim, config.dim, strides=config.stem_strides, **factory)
        rates = iter(_linear_rates(config.drop_path_rate, sum(config.depths)))
        self.levels = nn.ModuleList(
            _build_level(config, level, [next(rates) for _ in range(config.depths[level])], factory)
            for level in range(NUM_LEVELS)
        )
        maps = FeatureInfo(
            {"num_chs": channels, "reduction": reduction, "module": f"levels.{level}"}
            for level, (channels, reduction) in enumerate(zip(config.channels, config.reductions, strict=True))
        )
        self.feature_info = FeatureInfo(maps[level] for level in self.out_indices)
        self.init_weights()

    def init_weights(self) -> None:
        """Linear weights from a truncated normal (0.02), biases 0, the scan's own start; the rest as PyTorch does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)
        for module in self.modules():
            if isinstance(module, MambaVisionMixer):
                module.init_scan_parameters()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps of `out_indices`, (batch, channels, H / reduction, W / reduction) each, sizes rounded up."""
        maps = self._level_maps(x, last=max(self.out_indices))
        return [maps[level] for level in self.out_indices]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Final and intermediate feature maps, with timm's arguments.

        Args:
            x: pictures, (batch, in_chans, height, width).
            indices: levels to take: a list, a number for the last so many, or None for all.
            norm: apply the final norm to the last level's map, where the network has one.
            stop_early: leave out the levels behind the last index.
            output_fmt: layout of the maps.
            intermediates_only: return the maps alone.

        Returns:
            (final map after the norm, maps), or the maps.

        Raises:
            ValueError: an index names no level, or the layout is unknown.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt!r}.")
        end = len(self.levels) - 1
        taken = _level_indices(indices, levels=len(self.levels))
        last = max(taken) if stop_early and intermediates_only else end
        maps = self._level_maps(x, last=last)
        final = self._final_norm(maps[-1]) if last == end else maps[-1]
        intermediates = [final if norm and level == end else maps[level] for level in taken]
        return intermediates if intermediates_only else (final, intermediates)

    def forward_stages(self, x: Tensor, *, last: int = NUM_LEVELS - 1) -> list[Tensor]:
        """The stem's output, then the maps of the levels up to `last`, without the final norm."""
        self._check_input(x)
        x = self.patch_embed(x)
        stages = [x]
        for index, level in enumerate(self.levels):
            stages.append(level(x))
            if index == last:
                break
            x = level.downsample(stages[-1])  # type: ignore[operator]  # ModuleList forgets its type
        return stages

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward instead of keeping them: less memory, more time."""
        for level in self.levels:
            level.grad_checkpointing = enable  # type: ignore[assignment]  # ModuleList forgets its type

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must spare: the scan's A and D."""
        return {name for name, _ in self.named_parameters() if name.endswith((".A_log", ".D"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates as timm forms them."""
        return {
            "stem": r"^patch_embed",
            "blocks": r"^levels\.(\d+)"
            if coarse
            else [
                (r"^levels\.(\d+)\.downsample", (99999,)),
                (r"^levels\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    def _keep_levels(self, indices: int | Sequence[int]) -> list[int]:
        """Remove the levels behind the last of `indices`; returns these, counted from the first."""
        taken = _level_indices(indices, levels=len(self.levels))
        self.levels = self.levels[: max(taken) + 1]
        self.levels[-1].downsample = None  # type: ignore[assignment]  # ModuleList forgets its type
        return list(taken)

    def _final_norm(self, x: Tensor) -> Tensor:
        return x

    def _level_maps(self, x: Tensor, *, last: int) -> list[Tensor]:
        """Maps of the levels up to `last`."""
        return self.forward_stages(x, last=last)[1:]

    def _check_input(self, x: Tensor) -> None:
        channels = self.config.in_chans
        conv = self.patch_embed.conv_down[0]
        offloaded = conv.weight.is_meta and "forward" in conv.__dict__  # a wrapper brings the weight when it is called
        if not isinstance(x, Tensor):
            raise TypeError(f"Expected a tensor of pictures, got {type(x).__name__}.")
        if x.dim() != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
            raise ValueError(f"Expected pictures as (batch, {channels}, height, width), got {tuple(x.shape)}.")
        if x.device.type != conv.weight.device.type and not offloaded:
            raise ValueError(
                f"Pictures are on {x.device} and the weights on {conv.weight.device}; move one to the other."
            )
        self._check_dtype(x)

    def _check_dtype(self, x: Tensor) -> None:
        weight = self.patch_embed.conv_down[0].weight
        if not x.dtype.is_floating_point:
            raise ValueError(f"Expected normalised pictures of a floating type, got {x.dtype}; convert and scale them.")
        if x.dtype == weight.dtype:
            return
        if torch.float64 in (x.dtype, weight.dtype) or not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"Pictures are {x.dtype} but the weights {weight.dtype}; cast one, or run under autocast.")


def init_linear(linear: nn.Linear) -> None:
    """Weights from a truncated normal of standard deviation 0.02, biases 0."""
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _build_level(config: MambaVisionConfig, level: int, rates: list[float], factory: dict[str, Any]) -> Level:
    dim = config.channels[level]
    downsample = Downsample(dim, **factory) if level < NUM_LEVELS - 1 else None
    if level < 2:
        blocks: list[nn.Module] = [
            ConvBlock(dim, layer_scale=config.layer_scale_conv, drop_path=rate, **factory) for rate in rates
        ]
        return Level(blocks, downsample=downsample, window_size=None)
    blocks = [
        TokenBlock(
            dim,
            _build_mixer(config, level, block, factory),
            mlp_ratio=config.mlp_ratio,
            layer_scale=config.layer_scale,
            drop_path=rate,
            **factory,
        )
        for block, rate in enumerate(rates)
    ]
    return Level(blocks, downsample=downsample, window_size=config.window_size[level])


def _build_mixer(config: MambaVisionConfig, level: int, block: int, factory: dict[str, Any]) -> nn.Module:
    depth = config.depths[level]
    scans = {
        "mamba_first": block < math.ceil(depth / 2),
        "attention_first": block >= depth // 2,
        "mamba_only": True,
        "attention_only": False,
    }[config.mixer_order]
    dim = config.channels[level]
    if not scans:
        return Attention(dim, num_heads=config.num_heads[level], attn_drop=config.attn_drop_rate, **factory)
    return MambaVisionMixer(
        dim, d_state=config.d_state, d_conv=config.d_conv, dt_bias_init=config.dt_bias_init, **factory
    )


def _linear_rates(rate: float, count: int) -> list[float]:
    """`count` values rising from 0 to `rate`."""
    return [rate * index / max(count - 1, 1) for index in range(count)]


def _level_indices(indices: int | Sequence[int] | None, *, levels: int = NUM_LEVELS) -> tuple[int, ...]:
    """Levels counted from the first; of `levels`, a number means the last so many and None all."""
    if indices is None:
        return tuple(range(levels))
    if isinstance(indices, int):
        if not 1 <= indices <= levels:
            raise ValueError(f"There are {levels} levels to take the last of, got {indices}.")
        return tuple(range(levels - indices, levels))
    if len(indices) == 0 or any(not -levels <= index < levels for index in indices):
        raise ValueError(f"Level indices must lie in {-levels}..{levels - 1}, got {tuple(indices)}.")
    return tuple(index % levels for index in indices)
