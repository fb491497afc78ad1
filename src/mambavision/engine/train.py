"""A training run on one device: data, steps, evaluations, checkpoints; and its exact continuation.

A run is a sequence of steps, and step n uses batches and random numbers that follow from the seed and from n alone
(`mambavision.data.seeds`). A checkpoint therefore holds tensors and the number of the next step, and a run continued
from it, also from the middle of an epoch, is the run that was never interrupted.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mambavision.data import DataError
from mambavision.data.folder import open_training
from mambavision.data.loader import TrainBatches, make_loader
from mambavision.data.pools import Pictures, cache
from mambavision.data.transforms import build_train_transform
from mambavision.engine.checkpoint import LAST, save_run
from mambavision.engine.config import TrainConfig
from mambavision.engine.evaluate import Evaluation, evaluate, evaluation_batches
from mambavision.engine.logs import RunLog
from mambavision.engine.nonfinite import NonFiniteError, first_bad_layer
from mambavision.engine.plots import plot_run
from mambavision.engine.step import TrainingStep
from mambavision.factory import create_model
from mambavision.files import replaced_when_done
from mambavision.inference.predictor import find_device
from mambavision.models.classifier import MambaVision
from mambavision.weights import loading, save_checkpoint

BEST = "best.safetensors"
FINAL = "final.safetensors"
BAD_PICTURES = "bad_pictures.txt"
KEPT_BYTES = 2**30  # evaluation pictures up to this size are also kept normalised, as float32


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run gives.

    Attributes:
        best: weights of the evaluation with the highest top-1 accuracy.
        final: weights after the last step; choose these when the evaluation pictures are a test set.
        best_top1: in percent.
        final_top1: in percent.
        bad_pictures: how many pictures could not be read.
    """

    best: Path
    final: Path
    best_top1: float
    final_top1: float
    bad_pictures: int


class TrainingRun:
    """One run, set up on construction.

    Args:
        config: its settings; everything is written to `config.output`.
        console: where progress is shown.
        resumed: checkpoint to continue from, as `load_run` reads it.

    Raises:
        DataError: when the data cannot be used.
        ValueError: when a setting does not fit this machine or this data.
    """

    def __init__(self, config: TrainConfig, console: Console, resumed: dict[str, Any] | None = None) -> None:
        if config.data.dir is None:
            raise DataError("Say what to train on: --data FOLDER.")
        self.config = config
        self.console = console
        self.folder = Path(config.output)
        there = next(place for place in (self.folder, *self.folder.absolute().parents) if place.exists())
        if not there.is_dir():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(there))
        self.device = find_device(config.runtime.device)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # one shape throughout
        self.bad: dict[str, str] = {}
        training, self.evaluation = self._open_data()
        torch.manual_seed(config.seed)
        self.model = self._create_model(training.class_names, resumed=resumed is not None)
        self.batches = TrainBatches(
            training,
            build_train_transform(config.augment, self.model.config.preprocessing),
            batch_size=config.batch_size,
            batches_per_step=config.accumulate,
            seed=config.seed,
        )
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.total = config.epochs * self.steps_per_epoch
        self.step = TrainingStep(self.model, config, steps_per_epoch=self.steps_per_epoch, device=self.device)
        self.done = 0
        self.best_top1 = -math.inf
        self.epoch_loss = 0.0  # sum over the steps of the epoch so far
        self._last_rate = math.nan  # learning rate of the last step
        if resumed is not None:
            self._resume(resumed)
        self.folder.mkdir(parents=True, exist_ok=True)  # now that nothing is refused any more
        self._cached_evaluation: list[Any] | None = None
        self._looked = self._epoch_started = 0.0, self.done  # time and step; see `_start_clock`
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        console.print(
            f"{config.model.name}: {parameters:,} parameters, {len(training.class_names)} classes; "
            f"{len(training):,} training and {len(self.evaluation):,} evaluation pictures; "
            f"{self.steps_per_epoch} steps an epoch; {self.device}, {config.runtime.precision}",
        )
        if self.device.type == "cuda" and not config.runtime.compile and find_spec("triton"):
            console.print(
                "Steps wait for the host: with --compile, once it has compiled, they take a fraction of the time."
            )

    def run(self) -> RunResult:
        """Train to the end.

        Raises:
            NonFiniteError: when the loss or a gradient is not finite.
            DataError: when no picture can be read.
        """
        log = RunLog(
            self.folder,
            self.console,
            start_step=self.done,
            start_epoch=self.done // self.steps_per_epoch,
            epochs=self.config.epochs,
            steps_per_epoch=self.steps_per_epoch,
        )
        result = None
        self._start_clock()
        try:
            for batches in self._steps():
                self.step.run(self.done, batches)
                self.done += 1
                epoch_ends = self.done % self.steps_per_epoch == 0
                every = self.config.runtime.checkpoint_every
                checkpoint_due = every > 0 and self.done % every == 0
                if self.done % self.config.runtime.log_every == 0 or epoch_ends or checkpoint_due:
                    self._look(log)
                if epoch_ends:
                    result = self._end_epoch(log)
                elif checkpoint_due:
                    self._checkpoint()
        finally:
            log.close()
            self._write_bad()
        if result is None:  # continued from a run that was complete
            result = self._evaluate()
        self._save_weights(FINAL, result)
        plot_run(self.folder)
        return RunResult(
            best=self.folder / BEST,
            final=self.folder / FINAL,
            best_top1=self.best_top1,
            final_top1=result.top1,
            bad_pictures=len(self.bad),
        )

    def _open_data(self) -> tuple[Pictures, Pictures]:
        data = self.config.data
        training, evaluation = open_training(
            data.dir or "",
            val_split=data.val_split,
            split_seed=data.split_seed,
            limit_train=data.limit_train,
            class_names=data.class_names,
        )
        if data.cache:
            training, bad = cache(training, data.workers)
            evaluation, worse = cache(evaluation, data.workers)
            self.bad.update(bad | worse)
        return training, evaluation

    def _create_model(self, class_names: tuple[str, ...], *, resumed: bool) -> MambaVision:
        settings = self.config.model
        # A continued run has weights of its own: those it began with are not wanted, nor what they were changed for. A
        # checkpoint is read all the same, for the architecture and preprocessing in it.
        loading.logger.disabled = resumed
        try:
            model = create_model(
                settings.name,
                pretrained=settings.pretrained and not resumed,
                checkpoint_path=settings.checkpoint,
                class_names=class_names,
                device=self.device,
                **settings.overrides,
            )
        finally:
            loading.logger.disabled = False
        if not isinstance(model, MambaVision) or model.config.in_chans != 3:
            raise ValueError(f"Training wants a network of 3 input channels, got model.overrides {settings.overrides}.")
        return model.to(memory_format=torch.channels_last) if self.config.runtime.channels_last else model

    def _steps(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """The batches of every step from `done` on."""
        each = self.config.accumulate
        loader = make_loader(
            self.batches,
            range(self.done * each, self.total * each),
            workers=self.config.data.workers,
            pin_memory=self.device.type == "cuda",
        )
        loaded = iter(loader)
        while batches := list(itertools.islice(loaded, each)):
            for _, _, bad in batches:
                self.bad.update(bad)
            yield [(pictures, labels) for pictures, labels, _ in batches]

    def _look(self, log: RunLog) -> None:
        """Fetch and log the steps since the last look; stop when one of them was not finite."""
        rows = self.step.read_history()
        now = time.perf_counter()
        speed = (self.done - self._looked[1]) * self._step_size / (now - self._looked[0])
        self._looked = now, self.done
        log.steps(rows, speed)
        for step, rate, loss, norm in rows:
            norm_counts = self.config.runtime.precision != "float16"
            if not math.isfinite(loss) or (norm_counts and not math.isfinite(norm)):
                raise NonFiniteError(self._explain(step, rate, loss, norm))
            self.epoch_loss += loss
            self._last_rate = rate

    def _explain(self, step: int, rate: float, loss: float, norm: float) -> str:
        each = self.config.accumulate
        batches = [self.batches[position] for position in range(step * each, (step + 1) * each)]

        def losses() -> Tensor:
            parts = [
                self.step.loss(self.model, step, number, pictures, labels)
                for number, (pictures, labels, _) in enumerate(batches)
            ]
            return torch.stack(parts).mean()

        return (
            f"Step {step} (epoch {step // self.steps_per_epoch + 1}, learning rate {rate:.3e}) has loss {loss} and "
            f"gradient norm {norm}: {first_bad_layer(self.model, losses)}. Try a lower optim.lr, a longer "
            "optim.warmup_epochs, optim.clip_grad or runtime.precision bfloat16."
        )

    def _end_epoch(self, log: RunLog) -> Evaluation | None:
        epoch = self.done // self.steps_per_epoch - 1
        seconds = time.perf_counter() - self._epoch_started[0]
        steps = self.done - self._epoch_started[1]
        evaluated = (epoch + 1) % self.config.runtime.eval_every == 0 or self.done == self.total
        result = self._evaluate() if evaluated else None
        log.epoch(
            {
                "epoch": epoch,
                "step": self.done - 1,
                "lr": self._last_rate,
                "train_loss": self.epoch_loss / self.steps_per_epoch,
                "val_loss": result.loss if result else math.nan,
                "val_top1": result.top1 if result else math.nan,
                "val_top5": result.top5 if result else math.nan,
                "images_per_second": steps * self._step_size / seconds,
                "seconds": seconds,
            }
        )
        self.epoch_loss = 0.0
        if result is not None:
            if result.top1 > self.best_top1:
                self.best_top1 = result.top1
                self._save_weights(BEST, result)
            self._checkpoint()
        self._start_clock()
        return result

    @property
    def _step_size(self) -> int:
        return self.config.batch_size * self.config.accumulate

    def _start_clock(self) -> None:
        """Begin a stretch of training time; evaluations and checkpoints lie between two of them."""
        self._looked = self._epoch_started = time.perf_counter(), self.done

    def _evaluate(self) -> Evaluation:
        runtime = self.config.runtime
        batches: Any = self._cached_evaluation
        if batches is None:
            batches = evaluation_batches(
                self.evaluation,
                self.model,
                batch_size=2 * self.config.batch_size,
                workers=self.config.data.workers,
                device=self.device,
            )
            height, width = self.model.config.preprocessing.img_size
            if self.config.data.cache and 12 * height * width * len(self.evaluation) <= KEPT_BYTES:
                batches = self._cached_evaluation = list(batches)
        result = evaluate(
            self.step.averaged,
            batches,
            num_classes=self.model.config.num_classes,
            device=self.device,
            precision=runtime.precision,
            channels_last=runtime.channels_last,
        )
        self.bad.update(result.bad)
        return result

    def _save_weights(self, name: str, result: Evaluation) -> None:
        save_checkpoint(
            self.folder / name,
            self.step.averaged.state_dict(),
            self.model.config,
            metrics={"top1": result.top1, "top5": result.top5, "loss": result.loss},
            extra={"step": self.done, "training": self.config.to_dict()},
        )

    def _checkpoint(self) -> None:
        state = {
            "step": self.done,
            "epoch": self.done // self.steps_per_epoch,
            "step_in_epoch": self.done % self.steps_per_epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "epoch_loss": self.epoch_loss,
            "best_top1": self.best_top1,
            "config": self.config.to_dict(),
        }
        save_run(self.folder / LAST, state | self.step.state_dict())

    def _resume(self, state: dict[str, Any]) -> None:
        before = state.get("steps_per_epoch", self.steps_per_epoch)  # checkpoints of older versions lack it
        if before != self.steps_per_epoch:
            raise ValueError(
                f"The run that is continued has {before} steps an epoch, and this one {self.steps_per_epoch}: keep its "
                "data, and batch_size times accumulate; a smaller batch with a larger accumulate takes less memory."
            )
        if state["step"] > self.total:
            raise ValueError(f"The checkpoint has done {state['step']} steps and this run has {self.total}.")
        self.step.load_state_dict(state, state["step"])
        self.done = state["step"]
        self.epoch_loss = state["epoch_loss"]
        self.best_top1 = state["best_top1"]

    def _write_bad(self) -> None:
        if not self.bad:
            return
        path = self.folder / BAD_PICTURES
        before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []  # of the run that is continued
        reasons = sorted({*before, *self.bad.values()})
        with replaced_when_done(path) as temporary:
            temporary.write_text("".join(f"{reason}\n" for reason in reasons), encoding="utf-8")
        self.console.print(f"Pictures that could not be read and were passed over: {len(reasons)}, named in {path}.")
