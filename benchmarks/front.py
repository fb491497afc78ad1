"""The front of accuracy over throughput as a picture, from what was measured.

    python benchmarks/front.py

Ours are the rows of results/gpu_inference.json at batch 128; the original and its peers those of
results/others_h200.json and, where the run of ours timed them too, of the former. Runs on different GPUs meet in one
picture by their ratio to compiled convnext_tiny, which each of them timed. Writes docs/front.png and docs/front.svg.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from mambavision.files import replaced_when_done
from readme_tables import OURS, best_ways

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
STYLES = {
    "ours": {"color": "#0b6e4f", "marker": "o", "linestyle": "-", "zorder": 3},
    "original": {"color": "#b3541e", "marker": "s", "linestyle": "--", "zorder": 2},
    "peer": {"color": "#6b7280", "marker": "^", "linestyle": "none", "zorder": 1},
}

USUAL = "224 x 224"  # size of the pictures; another is said
MARKER_SIZE = 8  # pixels at the resolution in which names are placed
# Where a name may stand beside its point, in points, and which of its sides is there; the first free one is taken.
PLACES = (
    ((6, 4), "left"),
    ((6, -10), "left"),
    ((-6, 4), "right"),
    ((-6, -10), "right"),
    ((0, 8), "center"),
    ((0, -15), "center"),
    ((8, -3), "left"),
    ((-8, -3), "right"),
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


def draw() -> Figure:
    """The picture."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)  # which measures texts
    axes = figure.subplots()
    kinds, labels = points()
    for kind, rows in kinds.items():
        axes.plot([x for x, *_ in rows], [y for _, y, _ in rows], label=labels[kind], **STYLES[kind])
    axes.set_xlabel("images / s, relative to compiled convnext_tiny in the same run (batch 128)")
    axes.set_ylabel("published top-1 on ImageNet-1K / %")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    _name_points(figure, axes, kinds)
    return figure


def _name_points(figure: Figure, axes: Any, kinds: dict[str, list[tuple[float, float, str]]]) -> None:
    """Write each name beside its point, where the names before leave room."""
    figure.draw_without_rendering()
    taken: list[Any] = []
    for rows in kinds.values():  # markers first: a name over another point would seem to be that point's
        for x, y, _ in rows:
            left, bottom = axes.transData.transform((x, y)) - MARKER_SIZE / 2
            taken.append(Bbox.from_bounds(left, bottom, MARKER_SIZE, MARKER_SIZE))
    for kind, rows in kinds.items():
        for x, y, name in rows:
            for place, side in PLACES:
                text = axes.annotate(
                    name,
                    (x, y),
                    xytext=place,
                    textcoords="offset points",
                    ha=side,
                    fontsize=8,
                    color=STYLES[kind]["color"],
                )
                box = text.get_window_extent(figure.canvas.get_renderer())
                if not any(box.overlaps(other) for other in taken):
                    break
                text.remove()
            else:
                axes.add_artist(text)
            taken.append(box)


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def main() -> None:
    """Draw and write both files."""
    figure = draw()
    for path in (DOCS / "front.png", DOCS / "front.svg"):
        with replaced_when_done(path) as temporary:
            figure.savefig(
                temporary, format=path.suffix[1:], dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None
            )
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
