"""Speeds as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from mambavision.files import replaced_when_done
from mambavision.measure.timing import Measurement


def plot_speeds(measured: Sequence[Measurement], path: Path, *, title: str) -> None:
    """Draw images a second over the batch size, a curve a network, way and type; the suffix of `path` is the format."""
    curves: dict[str, list[Measurement]] = {}
    for entry in measured:
        curves.setdefault(f"{entry.model}, {entry.way}, {entry.dtype}", []).append(entry)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for label, entries in curves.items():
        entries.sort(key=lambda entry: entry.batch_size)
        speeds = [entry.images_per_second for entry in entries]
        axes.plot([entry.batch_size for entry in entries], speeds, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size / pictures")
    axes.set_ylabel("images / s")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    with replaced_when_done(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)
