"""A trained network made fast for inference, in one call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mambavision.config import NUM_LEVELS
from mambavision.inference.cpu import CALLED_WHEN_PACKED, UNSAVED, Packed, can_pack, has_fast_bfloat16, optimize_for_cpu
from mambavision.inference.cudnn import fastest_convolutions
from mambavision.inference.fuse import FusedMambaVision, check_network, fuse
from mambavision.inference.gpu import KernelStem, KernelTokens, use_kernels
from mambavision.inference.graphs import GraphRunner
from mambavision.layers.conv_block import ConvBlock
from mambavision.layers.plain import has_own_hooks
from mambavision.layers.stem import Downsample, Stem
from mambavision.layers.token_block import Mlp
from mambavision.models.backbone import Level, MambaVisionBackbone
from mambavision.models.classifier import MambaVision
from mambavision.ops.backend import Situation, refuse_inference_kernels
from mambavision.ops.float8 import refuse_float8_kernels
from mambavision.ops.precision import HALVES
from mambavision.ops.tiles import measuring

Mode = Literal["instant", "full"]
_logger = logging.getLogger("mambavision")


def optimize(
    model: MambaVisionBackbone, *, mode: Mode = "instant", dtype: torch.dtype | None = None
) -> MambaVisionBackbone:
    """A copy of `model` for inference, made fast for the model's device.

    The copy has the interface of `model`: it takes pictures of any floating type and gives results in that type. Norms,
    layer scale and the final norm are folded into their neighbours and projections are merged (`fuse`). On a CUDA
    device the rest runs in half precision through fused kernels (a warning says why where it cannot), replayed from a
    CUDA graph for each of a few shapes (`graphs.MAX_GRAPHS`; a shape's second call records). On a CPU see
    `inference.cpu`; elsewhere it is folded and cast. `model` itself is left as it is.

    Args:
        model: a classifier or a backbone with its weights, on the device where the copy shall run.
        mode: `instant` runs at once. `full` takes longer for the first call of a shape, on a GPU to try several tiles
            for each kernel, on a CPU without packed kernels to compile.
        dtype: of the arithmetic; by default bfloat16 on a GPU that has it, float16 on an older one, bfloat16 on a CPU
            with instructions for it (`cpu.has_fast_bfloat16`), float32 elsewhere.
            float8_e4m3fn is for the convolutions of the blocks, and the linear layers of many tokens, with bfloat16
            around them: faster where channels are many, and less exact (see `inference.float8`).

    Raises:
        TypeError: the model is no network of this package.
        ValueError: an unknown mode, a model on the meta device, optimised already or with another pool than the
            average, one with adapters, hooks or other activations, which the copy would leave out, or float8 where
            it cannot run.
    """
    check_network(model, "optimize takes a MambaVision network")
    if isinstance(model, _AnyType):
        raise ValueError("The model is optimised already; pass the one that it was made of.")
    if isinstance(model, MambaVision) and model.pool_type != "avg":
        raise ValueError(
            f"optimize takes networks that average their last map, not {model.pool_type!r}; use `fuse`, or for feature "
            "maps a network of mambavision.create_model(..., features_only=True)."
        )
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}.")
    fused = fuse(model)
    device = next(fused.parameters()).device
    float8 = dtype == torch.float8_e4m3fn
    if float8:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            fault = refuse_float8_kernels(Situation(device.type, torch.float8_e4m3fn))
        if fault is not None:
            raise ValueError(f"optimize cannot compute in float8 here: {fault}. Choose another type.")
        dtype = torch.bfloat16
    if device.type == "cpu":
        dtype = dtype or (torch.bfloat16 if has_fast_bfloat16() else torch.float32)
        if can_pack(dtype):
            _check_as_built(model, called=(*_CALLED, *CALLED_WHEN_PACKED))
        return _of_kind(optimize_for_cpu(fused, dtype=dtype, mode=mode), _CpuClassifier, _CpuBackbone, dtype)
    if dtype is None:
        dtype = torch.float32
        if device.type == "cuda":
            with torch.cuda.device(device):
                dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fault = refuse_inference_kernels(Situation(device.type, dtype))
    if fault is None:
        _check_as_built(model, called=_CALLED)
        use_kernels(fused, float8=float8)
    elif device.type == "cuda" and dtype in HALVES:
        _logger.warning("optimize goes without its fused kernels: %s.", fault)
    return finished(fused, dtype=dtype, tune=mode == "full")


# Modules of the network that every copy still calls.
_CALLED: tuple[type, ...] = (Level, nn.ModuleList)
# What the kernels compute without calling it, and how it must be set.
_ACTIVATIONS: dict[type, dict[str, nn.Module]] = {
    Stem: {"conv_down.2": nn.ReLU(), "conv_down.5": nn.ReLU()},
    ConvBlock: {"act1": nn.GELU(approximate="tanh")},
    Mlp: {"act": nn.GELU()},
}


def _check_as_built(model: MambaVisionBackbone, *, called: tuple[type, ...]) -> None:
    """ValueError where something that the copy does not call does more, or other, than the network's own.

    Args:
        model: what is copied.
        called: kinds of modules that the copy calls.
    """
    for name, module in model.named_modules():
        if name.split(".")[0] not in ("patch_embed", "levels"):
            continue
        for part, expected in _ACTIVATIONS.get(type(module), {}).items():
            found = repr(module.get_submodule(part)).replace("inplace=True", "")
            if found != repr(expected) and not isinstance(expected, called):
                raise ValueError(f"{name}.{part} is {found}, and the kernels compute {expected}; use `fuse`.")
        if isinstance(module, Downsample) and type(module.reduction[0]) is not nn.Conv2d:
            raise ValueError(f"{name}.reduction.0 is a {type(module.reduction[0]).__name__}; merge adapters first.")
        if has_own_hooks(module) and not isinstance(module, called):
            raise ValueError(f"{name} has a hook, which the copy would not call; remove it first.")


def finished(fused: MambaVisionBackbone, *, dtype: torch.dtype, tune: bool) -> MambaVisionBackbone:
    """`fused`, cast, with its constants formed and with graphs where the device has them; `optimize` calls it last."""
    fused = fused.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in fused.modules():
        if isinstance(module, KernelTokens):
            module.round_constants()
    optimized = _of_kind(fused, _OptimizedClassifier, _OptimizedBackbone, dtype)
    optimized.tune_kernels = tune
    # The stem's kernel reads pictures as they come; PyTorch's own convolutions want channels-last.
    layout = torch.preserve_format if isinstance(fused.patch_embed, KernelStem) else torch.channels_last
    optimized.graphs = GraphRunner(dtype=dtype, memory_format=layout)
    return optimized


def _of_kind(network: Any, classifier: type, backbone: type, dtype: torch.dtype) -> Any:
    """`network` itself as one of these classes, which change no parameter."""
    network.compute_dtype = dtype
    classifies = isinstance(network, MambaVision)
    network.__class__ = classifier if classifies else backbone
    if classifies and not hasattr(network, "_head_of_maps"):  # `fuse` folds it for our own class alone
        network.fold_head()
    return network


class _AnyType(MambaVisionBackbone):
    """A network that computes in one type, takes pictures of any, and gives results in theirs."""

    compute_dtype: torch.dtype

    def forward(self, x: Tensor) -> Any:
        """As the network's own, in the type of x."""
        self._check_input(x)
        return _cast(self._run(x), x.dtype)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As the network's own, in the type of x."""
        found = super().forward_intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only)
        return _cast(found, x.dtype)

    def forward_stages(self, x: Tensor, *, last: int = NUM_LEVELS - 1) -> list[Tensor]:
        """As the network's own, in the type that it computes in."""
        self._check_input(x)
        return super().forward_stages(x.to(self.compute_dtype), last=last)

    def _run(self, x: Tensor) -> Any:
        return super().forward(x)

    def _check_dtype(self, x: Tensor) -> None:
        if not x.dtype.is_floating_point:
            super()._check_dtype(x)


def _cast(output: Any, dtype: torch.dtype) -> Any:
    """A tensor, or lists and tuples of them, in another type."""
    return output.to(dtype) if isinstance(output, Tensor) else type(output)(_cast(part, dtype) for part in output)


class _Classifier(_AnyType, FusedMambaVision):
    """What classifiers have beside `forward`."""

    def forward_features(self, x: Tensor) -> Tensor:
        """As the network's own, in the type of x."""
        return super().forward_features(x).to(x.dtype)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """As the network's own, in the type of x."""
        return super().forward_head(x.to(self.compute_dtype), pre_logits).to(x.dtype)


class _Optimized(_AnyType):
    """What the optimised classifier and backbone share on a GPU: graphs, and channels that pad."""

    tune_kernels: bool
    graphs: GraphRunner

    def _run(self, x: Tensor) -> Any:
        busy = torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        if busy or not x.is_cuda or x.numel() == 0 or (torch.is_grad_enabled() and x.requires_grad):
            return self._run_as_it_is(x)
        return self.graphs.run(self._run_as_it_is, x)

    def _run_as_it_is(self, x: Tensor) -> Any:
        if torch.compiler.is_compiling():  # the compiler has settings of its own
            with torch.autocast(x.device.type, enabled=False):
                return super()._run(x)
        tuning = measuring() if self.tune_kernels else nullcontext()
        with torch.autocast(x.device.type, enabled=False), fastest_convolutions(), tuning:
            return super()._run(x)

    def forward_stages(self, x: Tensor, *, last: int = NUM_LEVELS - 1) -> list[Tensor]:
        """As the network's own; channels that only pad are cut off what is given out."""
        self._check_input(x)
        widths = self.config.channels
        x = self.patch_embed(x.to(self.compute_dtype))
        stages = [x[:, : widths[0]]]
        for index, level in enumerate(self.levels):
            x = level(x)
            stages.append(x[:, : widths[index]])
            if index == last:
                break
            x = level.downsample(x)  # type: ignore[operator]  # ModuleList forgets its type
        return stages

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Optimized:
        self.graphs.clear()
        super()._apply(fn, recurse)
        self.compute_dtype = self.graphs.dtype = next(self.parameters()).dtype
        for module in self.modules():
            if isinstance(module, KernelTokens):
                module.round_constants()
        return self

    def _keep_levels(self, indices: int | Sequence[int]) -> list[int]:
        self.graphs.clear()
        return super()._keep_levels(indices)


class _OnCpu(_AnyType):
    """What the optimised classifier and backbone share on a CPU, whose kernels have no backward."""

    def forward_stages(self, x: Tensor, *, last: int = NUM_LEVELS - 1) -> list[Tensor]:
        """As the network's own; RuntimeError where a gradient would be lost."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "A network optimised for a CPU has no gradients; run it under torch.no_grad(), or use the model itself."
            )
        return super().forward_stages(x, last=last)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _OnCpu:
        moved = fn(torch.empty(0, dtype=self.compute_dtype))
        if moved.dtype != self.compute_dtype or moved.device.type != "cpu":
            raise RuntimeError(
                "The packed weights of a network optimised for a CPU keep their type and place: move or cast the model "
                "that it was made of, and optimize that."
            )
        super()._apply(fn, recurse)
        return self

    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        """RuntimeError where weights are packed: no state dict has them, and one without them would be a trap."""
        self._refuse_packed()
        return super().state_dict(*arguments, **named)

    def load_state_dict(self, *arguments: Any, **named: Any) -> Any:
        """RuntimeError where weights are packed: none could be loaded into them."""
        self._refuse_packed()
        return super().load_state_dict(*arguments, **named)

    def _refuse_packed(self) -> None:
        if any(isinstance(module, Packed) for module in self.modules()):
            raise RuntimeError(UNSAVED)


class _CpuBackbone(_OnCpu):
    """A backbone on a CPU."""


class _CpuClassifier(_OnCpu, _Classifier):
    """A classifier on a CPU."""


class _OptimizedBackbone(_Optimized):
    """A backbone on a GPU."""


class _OptimizedClassifier(_Optimized, _Classifier):
    """A classifier on a GPU."""

    def fold_head(self) -> None:
        super().fold_head()
        if hasattr(self, "graphs"):
            self.graphs.clear()
