"""The front of accuracy over throughput as a picture, from what was measured.

    python benchmarks/front.py

Ours are the rows of results/gpu_inference.json at batch 128; the original and its peers those of
results/others_h200.json and, where the run of ours timed them too, of the former. Runs on different GPUs meet in one
picture by their ratio to compiled convnext_tiny, which each of them timed. Writes docs/front.png and docs/front.svg,
whose description has a fingerprint of what was drawn: by it a test knows when the picture is older than the results.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from mambavision.files import replaced_when_done
from readme_tables import OURS, REFERENCE, USUAL, best_ways

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
STYLES = {
    "ours": {"color": "#0b6e4f", "marker": "o", "linestyle": "-", "zorder": 3},
    "original": {"color": "#b3541e", "marker": "s", "linestyle": "--", "zorder": 2},
    "peer": {"color": "#6b7280", "marker": "^", "linestyle": "none", "zorder": 1},
}

MARKER_SIZE = 8  # pixels at the resolution in which names are placed
LINE_WIDTH = 3  # the same, for the lines between points
# Where a name may stand beside its point, in points, and which of its sides is there; the first of those is
# taken that cover least of what stands there already.
PLACES = (
    ((6, 4), "left"),
    ((6, -10), "left"),
    ((-6, 4), "right"),
    ((-6, -10), "right"),
    ((0, 8), "center"),
    ((0, -15), "center"),
    ((8, -3), "left"),
    ((-8, -3), "right"),
    ((18, 4), "left"),
    ((18, -10), "left"),
    ((-18, 4), "right"),
    ((-18, -10), "right"),
    ((0, 16), "center"),
    ((0, -23), "center"),
)


def points() -> tuple[dict[str, list[tuple[float, float, str]]], dict[str, str]]:
    """(relative throughput, top-1, name) of each kind, best way only; and a label for each kind."""
    measured = _read("gpu_inference")
    others = _read("others_h200")
    found: dict[str, dict[str, tuple[float, float, str]]] = {kind: {} for kind in STYLES}
    for row in [*others["rows"], *best_ways(measured["rows"])]:
        ours = row["model"].startswith(OURS)
        kind = row.get("kind") or ("ours" if ours else "peer")
        name = row["model"].removeprefix(OURS).removeprefix("tf_").split("_patch")[0]
        name = name.removesuffix("_224").removesuffix("_tf")
        if row.get("picture", USUAL) != USUAL:
            name += f" ({row['picture'].split()[0]} px)"
        point = (row["relative"], row["top1"], name)
        found[kind][name] = max(point, found[kind].get(name, point))  # a peer may have been timed in both runs
    labels = {
        "ours": f"this package, optimize ({measured['device']})",
        "original": f"the original, as published ({others['device']})",
        "peer": "timm, compiled",
    }
    return {kind: sorted(rows.values()) for kind, rows in found.items()}, labels


def rate() -> tuple[float, str]:
    """Images per second of the reference in our run, by which a ratio becomes images per second; and its device."""
    measured = _read("gpu_inference")
    (best,) = [row for row in best_ways(measured["rows"]) if row["model"] == REFERENCE]
    return best["images_per_second"], measured["device"]


def fingerprint() -> str:
    """What the picture shows of the results, as a few digits."""
    drawn = json.dumps([*points(), *rate()])
    return f"fingerprint of the results: {hashlib.sha256(drawn.encode()).hexdigest()[:16]}"


def draw() -> Figure:
    """The picture."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)  # which measures texts
    axes = figure.subplots()
    kinds, labels = points()
    for kind, rows in kinds.items():
        axes.plot([x for x, *_ in rows], [y for _, y, _ in rows], label=labels[kind], **STYLES[kind])
    axes.set_xlabel(f"images / s, relative to compiled {REFERENCE} in the same run (batch 128)")
    reference, device = rate()
    above = axes.secondary_xaxis("top", functions=(lambda x: x * reference, lambda x: x / reference))
    above.set_xlabel(f"images / s on {device}, as this package was timed")
    above.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("published top-1 on ImageNet-1K / %")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    _name_points(figure, axes, kinds)
    return figure


def _name_points(figure: Figure, axes: Any, kinds: dict[str, list[tuple[float, float, str]]]) -> None:
    """Write each name beside its point, where it covers least."""
    figure.draw_without_rendering()
    taken: list[Bbox] = [axes.get_legend().get_window_extent()]
    for rows in kinds.values():  # markers first: a name over another point would seem to be that point's
        for x, y, _ in rows:
            left, bottom = axes.transData.transform((x, y)) - MARKER_SIZE / 2
            taken.append(Bbox.from_bounds(left, bottom, MARKER_SIZE, MARKER_SIZE))
    for kind, rows in kinds.items():
        if STYLES[kind]["linestyle"] != "none":
            taken += _along(axes.transData.transform([(x, y) for x, y, _ in rows]))
    for kind, rows in kinds.items():
        for x, y, name in rows:
            texts = [
                axes.annotate(
                    name,
                    (x, y),
                    xytext=place,
                    textcoords="offset points",
                    ha=side,
                    fontsize=8,
                    color=STYLES[kind]["color"],
                )
                for place, side in PLACES
            ]
            boxes = [text.get_window_extent(figure.canvas.get_renderer()) for text in texts]
            best = min(
                range(len(PLACES)), key=lambda place: _covered(boxes[place], taken) + _outside(boxes[place], axes)
            )
            for text in texts[:best] + texts[best + 1 :]:
                text.remove()
            taken.append(boxes[best])


def _covered(box: Bbox, taken: list[Bbox]) -> float:
    """How much a name in `box` would cover of what is there, in square pixels."""
    shared = [Bbox.intersection(box, other) for other in taken]
    return sum(part.width * part.height for part in shared if part is not None)


def _outside(box: Bbox, axes: Any) -> float:
    """How much of a name in `box` would lie outside of the axes, in square pixels."""
    inside = Bbox.intersection(box, axes.bbox)
    return box.width * box.height - (0 if inside is None else inside.width * inside.height)


def _along(corners: np.ndarray) -> list[Bbox]:  # (points, 2), pixels
    """Small boxes that cover a line, side by side."""
    boxes = []
    for start, end in itertools.pairwise(corners):
        steps = int(np.hypot(*(end - start)) // LINE_WIDTH) + 1
        for left, bottom in np.linspace(start, end, steps) - LINE_WIDTH / 2:
            boxes.append(Bbox.from_bounds(left, bottom, LINE_WIDTH, LINE_WIDTH))
    return boxes


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def main() -> None:
    """Draw and write both files."""
    figure = draw()
    metadata = {".png": None, ".svg": {"Date": None, "Description": fingerprint()}}
    for path in (DOCS / "front.png", DOCS / "front.svg"):
        # The names of the SVG's parts are random without a salt, and every drawing of the same would differ.
        with replaced_when_done(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "front"}):
            figure.savefig(temporary, format=path.suffix[1:], dpi=130, metadata=metadata[path.suffix])
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
