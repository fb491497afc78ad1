"""Speeds as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from mambavision.files import replaced_when_done
from mambavision.measure.timing import Measurement

LINE_OF_LEGEND = 0.22  # inches
COLOURS = 10  # of curves, before they come again with another marker
MARKERS = "os^Dv*"


def plot_speeds(measured: Sequence[Measurement], path: Path, *, title: str) -> None:
    """Draw images a second over the batch size, a curve a network, way and type; the suffix of `path` is the format."""
    curves: dict[str, dict[int, float]] = {}
    for entry in measured:
        height, width = entry.img_size
        pixels = f"{height}" if height == width else f"{height}x{width}"
        label = f"{entry.model}, {pixels} px, {entry.way}, {entry.dtype}"
        curves.setdefault(label, {})[entry.batch_size] = entry.images_per_second
    # The legend stands below, and the figure grows with it, so that the axes keep their size.
    figure = Figure(figsize=(8, 5 + LINE_OF_LEGEND * len(curves)), layout="constrained")
    axes = figure.subplots()
    for number, (label, speeds) in enumerate(curves.items()):
        sizes = sorted(speeds)
        marker = MARKERS[number // COLOURS % len(MARKERS)]
        axes.plot(sizes, [speeds[size] for size in sizes], marker=marker, label=label)
    sizes = sorted({entry.batch_size for entry in measured})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(sizes[0] / 1.2, sizes[-1] * 1.2)
    axes.set_ylim(0, 1.08 * max(entry.images_per_second for entry in measured))
    axes.set_xlabel("batch size / pictures")
    axes.set_ylabel("images / s")
    axes.set_title(title, wrap=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=1)
    with replaced_when_done(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)
