"""Typed settings of a training run; a YAML recipe has exactly these keys, and so have the flags of `mambavision train`.

Standard library only. Each class checks itself once, on construction. The published training settings (arXiv
2407.08083, section 4) are in `recipes/`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from mambavision.data.config import AugmentConfig, DataConfig, check_at_least, check_one_of

Precision = Literal["float32", "bfloat16", "float16"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained.

    Attributes:
        name: a row of the variant table; see `mambavision models`.
        pretrained: start from the variant's published weights instead of from scratch.
        checkpoint: start from this file instead; its class count may differ.
        overrides: further arguments of `create_model`, such as mixer_order, drop_path_rate or img_size.
    """

    name: str = "mamba_vision_T"
    pretrained: bool = False
    checkpoint: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pretrained and self.checkpoint is not None:
            raise ValueError(f"pretrained and checkpoint exclude each other, got checkpoint={self.checkpoint!r} too.")
        taken = {"pretrained", "checkpoint_path", "num_classes", "class_names", "device", "dtype", "features_only"}
        if wrong := sorted(taken & set(self.overrides)):
            raise ValueError(f"overrides may not set {', '.join(wrong)}: training sets that itself.")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised: cross-entropy.

    Attributes:
        smoothing: label smoothing.
        mesa_weight: weight of the divergence from the moving-average model's prediction (MESA, Du et al. 2022);
            0 for none.
        mesa_start: share of the training after which that term begins.
    """

    smoothing: float = 0.1
    mesa_weight: float = 0.0
    mesa_start: float = 0.25

    def __post_init__(self) -> None:
        for name in ("smoothing", "mesa_start"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        check_at_least("mesa_weight", self.mesa_weight, 0)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the parameters move; names are timm's. Biases, norms and the scan's A_log and D never decay.

    Attributes:
        name: timm's name of the optimiser, such as adamw, lamb or sgd.
        lr: learning rate after warm-up, for the whole batch as given; nothing scales it.
        weight_decay: weight decay.
        kwargs: further arguments of the optimiser, such as betas or momentum.
        clip_grad: largest norm of all gradients together; null for no limit.
        schedule: timm's name of the schedule, such as cosine, poly or constant.
        warmup_epochs: epochs of linear warm-up, part of `epochs`.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: learning rate at the end.
        cooldown_epochs: epochs at min_lr at the end, part of `epochs`.
        ema: decay of the moving average of the weights, which is what is evaluated and saved; null for none.
        ema_warmup: let that decay rise with the steps from 0, so that the average is useful from the start.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    kwargs: dict[str, Any] = field(default_factory=dict)
    clip_grad: float | None = None
    schedule: str = "cosine"
    warmup_epochs: int = 0
    warmup_lr: float = 1e-6
    min_lr: float = 0.0
    cooldown_epochs: int = 0
    ema: float | None = None
    ema_warmup: bool = True

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}.")
        for name in ("weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs"):
            check_at_least(name, getattr(self, name), 0)
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr must not exceed lr {self.lr}, got {self.min_lr}.")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ValueError(f"clip_grad must be positive, got {self.clip_grad}.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must lie in (0, 1), got {self.ema}.")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Where and how it is computed.

    Attributes:
        device: auto (CUDA, then MPS, then CPU) or a name such as cuda:1.
        precision: type of autocast; float16 brings loss scaling; float32 computes in full precision.
        channels_last: keep pictures and convolutions in channels-last memory order.
        compile: torch.compile the network for training; evaluation stays uncompiled, so odd batches cost nothing.
        compile_mode: its mode.
        grad_checkpointing: keep the maps between blocks alone and compute the rest again in the backward: less memory,
            more time.
        log_every: steps between a look at the loss and a log entry; a non-finite loss is noticed there.
        eval_every: epochs between evaluations.
        checkpoint_every: steps between checkpoints within an epoch; 0 writes one after each evaluation only.
    """

    device: str = "auto"
    precision: Precision = "float32"
    channels_last: bool = False
    compile: bool = False
    compile_mode: CompileMode = "default"
    grad_checkpointing: bool = False
    log_every: int = 50
    eval_every: int = 1
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        check_one_of("precision", self.precision, Precision)
        check_one_of("compile_mode", self.compile_mode, CompileMode)
        check_at_least("log_every", self.log_every, 1)
        check_at_least("eval_every", self.eval_every, 1)
        check_at_least("checkpoint_every", self.checkpoint_every, 0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Attributes:
        model: what is trained.
        data: which pictures.
        augment: how they are varied.
        loss: what is minimised.
        optim: how the parameters move.
        runtime: where and how it is computed.
        epochs: passes over the training pictures, warm-up and cool-down included.
        batch_size: pictures in one forward pass.
        accumulate: forward passes whose gradients make one step.
        seed: of the initial weights and of every draw of the training.
        output: folder for checkpoints, metrics and curves.
    """

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    epochs: int = 100
    batch_size: int = 128
    accumulate: int = 1
    seed: int = 0
    output: str = "runs/train"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("seed", self.seed, 0)
        if self.augment.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size must be even for mixup and cutmix, got {self.batch_size}.")
        if self.loss.mesa_weight and self.optim.ema is None:
            raise ValueError(f"mesa_weight {self.loss.mesa_weight} needs the moving average: set optim.ema.")
        if self.optim.warmup_epochs + self.optim.cooldown_epochs >= self.epochs:
            raise ValueError(
                f"epochs must exceed warmup_epochs and cooldown_epochs together, got {self.epochs} against "
                f"{self.optim.warmup_epochs} + {self.optim.cooldown_epochs}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionaries, fit for YAML, JSON and `torch.save`."""
        return dataclasses.asdict(self)
