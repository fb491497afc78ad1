"""One optimiser step: forward and backward passes, clipping, update, moving average.

Nothing here waits for the device, except for an optimiser that is not fused, which must be told whether to step. The
loss and the gradient norm of each step stay on the device until `TrainingStep.read_history` fetches those of many steps
at once. A step with a non-finite loss or gradient changes no parameter. Neither does any step after it, so that the
state in which it happened can still be examined then; but under the loss scaling of float16, where such gradients are a
matter of course, training goes on with the next step until the history is read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mambavision.data.device import DeviceAugment
from mambavision.data.seeds import Stream, seed_globals
from mambavision.engine.config import TrainConfig
from mambavision.engine.precision import autocast
from mambavision.models.classifier import MambaVision

FUSED_OPTIMIZERS = ("adam", "adamw", "sgd")


class TrainingStep:
    """The network in training and all that changes with it.

    Args:
        model: the network, on its device.
        config: settings of the run.
        steps_per_epoch: steps in an epoch; sets the schedule.
        device: where it runs.
    """

    def __init__(self, model: MambaVision, config: TrainConfig, *, steps_per_epoch: int, device: torch.device) -> None:
        runtime, optim = config.runtime, config.optim
        self.model = model
        self.device = device
        self._config = config
        self._augment = DeviceAugment(
            config.augment,
            model.config.preprocessing,
            num_classes=model.config.num_classes,
            smoothing=config.loss.smoothing,
            device=device,
        )
        self._criterion: nn.Module = (
            SoftTargetCrossEntropy() if config.augment.mixes else LabelSmoothingCrossEntropy(config.loss.smoothing)
        )
        can_fuse = optim.name in FUSED_OPTIMIZERS and device.type in ("cpu", "cuda")
        kwargs: dict[str, Any] = ({"fused": True} if can_fuse else {}) | optim.kwargs
        self.optimizer = create_optimizer_v2(model, optim.name, lr=optim.lr, weight_decay=optim.weight_decay, **kwargs)
        self._scheduler, _ = create_scheduler_v2(
            self.optimizer,
            optim.schedule,
            num_epochs=config.epochs - optim.warmup_epochs - optim.cooldown_epochs,
            warmup_epochs=optim.warmup_epochs,
            warmup_lr=optim.warmup_lr,
            min_lr=optim.min_lr,
            warmup_prefix=True,  # the decay begins at the full rate, after the warm-up
            cooldown_epochs=optim.cooldown_epochs,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=runtime.precision == "float16")
        self.ema = ModelEmaV3(model, decay=optim.ema, use_warmup=optim.ema_warmup) if optim.ema is not None else None
        model.set_grad_checkpointing(runtime.grad_checkpointing)
        self._network = torch.compile(model, mode=runtime.compile_mode) if runtime.compile else model
        self._teacher: Any = None
        self._mesa_from = config.loss.mesa_start * config.epochs * steps_per_epoch
        if config.loss.mesa_weight and self.ema is not None:
            self._teacher = torch.compile(self.ema.module) if runtime.compile else self.ema.module

        self._failed = torch.zeros((), device=device)  # 1 from the first non-finite step on
        # A fused optimiser skips its update where `found_inf` is 1, without asking the host; GradScaler sets its own.
        self._skips_itself = bool(self.optimizer.defaults.get("fused")) and not self.scaler.is_enabled()
        if self._skips_itself:
            self.optimizer.found_inf = self._failed  # type: ignore[attr-defined]  # torch reads it with getattr
        # Sums need buffers of their own: those of a CUDA graph are overwritten by the next backward.
        self._sums = config.accumulate > 1
        if self._sums:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        self._history = torch.zeros(runtime.log_every, 2, device=device)
        self._pending: list[tuple[int, float]] = []

    @property
    def averaged(self) -> nn.Module:
        """The network that is evaluated and saved: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_step(self, step: int) -> None:
        """Put the schedule at `step`; it has no other state."""
        if self._scheduler is not None:
            self._scheduler.step_update(step)

    def run(self, step: int, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Do step number `step` (from 0) with the batches of uint8 pictures and labels whose gradients it sums."""
        if not self.model.training:  # asked first, since it walks through every module
            self.model.train()
        loss = torch.zeros((), device=self.device)
        for number, (pictures, labels) in enumerate(batches):
            part = self.loss(self._network, step, number, pictures, labels) / len(batches)
            self.scaler.scale(part).backward()
            loss += part.detach()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._config.optim.clip_grad or math.inf)
        self._history[len(self._pending), 0] = loss
        self._history[len(self._pending), 1] = norm
        self._pending.append((step, self.learning_rate))

        # Loss scaling meets infinite gradients as a matter of course; then the loss alone tells.
        watched = loss if self.scaler.is_enabled() else loss + norm
        torch.maximum(self._failed, (~watched.isfinite()).float(), out=self._failed)
        if self._skips_itself or self.scaler.is_enabled() or not self._failed.item():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=not self._sums)
        self.set_step(step + 1)
        if self.ema is not None:
            self.ema.update(self.model, step=step + 1)

    def loss(
        self, network: Callable[[Tensor], Tensor], step: int, number: int, pictures: Tensor, labels: Tensor
    ) -> Tensor:
        """Loss of batch `number` of a step; all that is random in it depends on the seed and on the place alone."""
        seed_globals(self._config.seed, Stream.STEP, step * self._config.accumulate + number)
        inputs, targets = self._augment(pictures, labels)
        if not self._config.runtime.channels_last:
            inputs = inputs.contiguous()
        with autocast(self.device, self._config.runtime.precision):
            logits = network(inputs)
        loss = self._criterion(logits.float(), targets)
        if self._teacher is not None and step >= self._mesa_from:
            loss = loss + self._config.loss.mesa_weight * self._divergence(logits, inputs)
        return loss

    def read_history(self) -> list[tuple[int, float, float, float]]:
        """Step, learning rate, loss and gradient norm of every step since the last call; waits for the device."""
        values = self._history[: len(self._pending)].tolist()
        rows = [(step, rate, loss, norm) for (step, rate), (loss, norm) in zip(self._pending, values, strict=True)]
        self._pending.clear()
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Everything that the steps so far have changed; tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Continue from `state`, as if `step` steps had been done; rates and decay are those configured here."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"] or state["model"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": copy.deepcopy(state["optimizer"]["state"]), "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        self.set_step(step)

    def _divergence(self, logits: Tensor, inputs: Tensor) -> Tensor:
        """Kullback-Leibler divergence of the prediction from that of the moving average, mean over the batch."""
        with torch.no_grad(), autocast(self.device, self._config.runtime.precision):
            target = self._teacher(inputs)
        return F.kl_div(
            F.log_softmax(logits.float(), dim=-1),
            F.log_softmax(target.float(), dim=-1),
            reduction="batchmean",
            log_target=True,
        )
