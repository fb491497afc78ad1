"""The curves of a run as one picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mambavision.engine.logs import EPOCHS, STEPS, read_table
from mambavision.files import replaced_when_done

CURVES = "curves.png"
SMOOTHED_OVER = 1 / 50  # of the run


def plot_run(folder: Path) -> Path:
    """Draw loss, accuracy and learning rate over the epochs from the tables in `folder` into `curves.png`."""
    steps, epochs = read_table(folder / STEPS), read_table(folder / EPOCHS)
    per_epoch = (epochs[-1]["step"] + 1) / (epochs[-1]["epoch"] + 1) if epochs else max(len(steps), 1)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    places = [(row["step"] + 1) / per_epoch for row in steps]
    loss.plot(places, _smoothed([row["loss"] for row in steps]), label="training, running mean", linewidth=1)
    evaluated = [row for row in epochs if row["val_top1"] == row["val_top1"]]  # not-a-number where there was none
    ends = [row["epoch"] + 1 for row in evaluated]
    loss.plot(ends, [row["val_loss"] for row in evaluated], label="evaluation", marker=_marker(ends))
    accuracy.plot(ends, [row["val_top1"] for row in evaluated], label="top-1", marker=_marker(ends))
    accuracy.plot(ends, [row["val_top5"] for row in evaluated], label="top-5", marker=_marker(ends), zorder=1)
    accuracy.set_ylim(top=100)
    rate.plot(places, [row["lr"] for row in steps])
    for axes, label in ((loss, "cross-entropy"), (accuracy, "accuracy / %"), (rate, "learning rate")):
        _label(axes, label)
    path = folder / CURVES
    with replaced_when_done(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


def _label(axes: Axes, label: str) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _marker(points: list[float]) -> str:
    return "o" if len(points) < 30 else ""


def _smoothed(values: list[float]) -> list[float]:
    """Mean of each value and those before it, over a window of the run's length times `SMOOTHED_OVER`."""
    window = max(1, round(len(values) * SMOOTHED_OVER))
    total, means = 0.0, []
    for number, value in enumerate(values):
        total += value - (values[number - window] if number >= window else 0.0)
        means.append(total / min(number + 1, window))
    return means
