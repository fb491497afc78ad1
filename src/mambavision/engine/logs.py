"""What a run leaves to read: one line a step and one an epoch as CSV, both in TensorBoard, and a progress display."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from mambavision.files import replaced_when_done

STEPS = "steps.csv"
EPOCHS = "epochs.csv"
STEP_FIELDS = ("step", "epoch", "lr", "loss", "grad_norm")
EPOCH_FIELDS = ("epoch", "step", "lr", "train_loss", "val_loss", "val_top1", "val_top5", "images_per_second", "seconds")


class Table:
    """A CSV file that grows by rows and is whole after each `add`.

    Args:
        path: the file; made with a header when missing.
        fields: its columns; floats are written in full.
        keep: column and limit: rows at or beyond the limit are dropped, those a continued run writes again.
    """

    def __init__(self, path: Path, fields: Sequence[str], *, keep: tuple[str, float]) -> None:
        column, limit = keep
        rows = _read_rows(path)[1] if path.exists() else []
        kept = [row for row in rows if float(row[fields.index(column)]) < limit]
        with replaced_when_done(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([fields, *kept])
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)

    def add(self, rows: Iterable[Sequence[object]]) -> None:
        """Append rows."""
        self._writer.writerows(rows)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_table(path: Path) -> list[dict[str, float]]:
    """Rows of a CSV file that `Table` wrote."""
    header, rows = _read_rows(path)
    return [dict(zip(header, map(float, row), strict=True)) for row in rows]


def _read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows, without a last line that a killed run has cut short."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = [line for line in file if line.endswith("\n")]
    header, *rows = list(csv.reader(lines)) or [[]]
    return header, [row for row in rows if len(row) == len(header)]


class RunLog:
    """Writes what happens in a run to its folder and to the screen.

    Args:
        folder: of the run.
        console: where people look; a progress bar on a terminal, one line an epoch elsewhere.
        start_step: step the run starts or continues at.
        start_epoch: its epoch.
        epochs: epochs of the whole run.
        steps_per_epoch: steps in one.
    """

    def __init__(
        self, folder: Path, console: Console, *, start_step: int, start_epoch: int, epochs: int, steps_per_epoch: int
    ) -> None:
        self._console = console
        self._epochs = epochs
        self._steps_per_epoch = steps_per_epoch
        self._steps = Table(folder / STEPS, STEP_FIELDS, keep=("step", start_step))
        self._epoch_table = Table(folder / EPOCHS, EPOCH_FIELDS, keep=("epoch", start_epoch))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "training", total=epochs * steps_per_epoch, completed=start_step, state="starting"
        )
        self._progress.start()

    def steps(self, rows: Sequence[tuple[int, float, float, float]], images_per_second: float) -> None:
        """Log step, learning rate, loss and gradient norm of steps that are done."""
        self._steps.add([(step, step // self._steps_per_epoch, rate, loss, norm) for step, rate, loss, norm in rows])
        step, rate, loss, norm = rows[-1]
        values = {"loss": loss, "lr": rate, "grad_norm": norm, "images_per_second": images_per_second}
        for name, value in values.items():
            self._board.add_scalar(f"train/{name}", value, step)
        self._progress.update(
            self._task,
            completed=step + 1,
            description=f"epoch {step // self._steps_per_epoch + 1}/{self._epochs}",
            state=f"loss {loss:.3f}  {images_per_second:,.0f} images/s  left",
        )

    def epoch(self, row: dict[str, Any]) -> None:
        """Log an epoch that is done; `row` has the `EPOCH_FIELDS`."""
        self._epoch_table.add([[row[name] for name in EPOCH_FIELDS]])
        for name in ("val_loss", "val_top1", "val_top5"):
            if not math.isnan(row[name]):
                self._board.add_scalar(name.replace("_", "/"), row[name], row["step"])
        accuracy = f"  val top-1 {row['val_top1']:.2f}  val loss {row['val_loss']:.3f}"
        if math.isnan(row["val_top1"]):
            accuracy = ""
        self._console.print(
            f"epoch {row['epoch'] + 1}/{self._epochs}  loss {row['train_loss']:.3f}{accuracy}"
            f"  lr {row['lr']:.2e}  {row['images_per_second']:,.0f} images/s  {row['seconds']:.1f} s",
        )

    def close(self) -> None:
        """Close the files and the display."""
        self._progress.stop()
        self._board.close()
        self._steps.close()
        self._epoch_table.close()
