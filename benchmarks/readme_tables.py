"""Fill the tables of README.md and docs/ from what was measured, so that no number is typed by hand.

    python benchmarks/readme_tables.py           # write
    python benchmarks/readme_tables.py --check   # exit code 1 when a document is out of date

A table stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->` and comes from `results/NAME.json`, which
`results_file.write_results` writes, or from a part of another such file (`PARTS`). The table `models` comes from the
package's own table of weights.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambavision import create_model
from mambavision.config import VARIANTS
from mambavision.models.complexity import count_complexity
from mambavision.weights import WEIGHTS

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
BLOCK = re.compile(r"(?P<begin><!-- begin:(?P<name>[\w-]+) -->\n).*?(?P<end><!-- end:(?P=name) -->)", re.DOTALL)
MARKER = re.compile(r"<!-- (?:begin|end):[\w-]+ -->")
UNMEASURED = "*Not measured yet.*"
OURS = "mamba_vision_"  # what the names of our models begin with
REFERENCE = "convnext_tiny"  # which every run times: what `relative` is relative to
USUAL = "224 x 224"  # pixels of most pictures
LARGE = "convnext_large"  # to which the largest of ours are compared, too


@dataclass(frozen=True)
class Column:
    """One column: a key of the rows, its heading, and how its numbers are written (Python's format specification)."""

    key: str
    heading: str
    form: str = ""


# What the tables of the formats share.
COMPARED = (
    Column("format", "format"),
    Column("dtype", "type"),
    Column("runtime", "runtime"),
    Column("bytes", "file / bytes", ","),
    Column("error", "error", ".1e"),
    Column("agreement", "PyTorch's class", ".1%"),
)
TIMED = (Column("milliseconds_1", "batch 1 / ms", ".1f"), Column("milliseconds_32", "batch 32 / ms", ".0f"))

# Which columns are shown; a name here is a block of a document and, but for `models` and `PARTS`, a file of `results/`.
TABLES: dict[str, tuple[Column, ...]] = {
    "models": (
        Column("model", "model"),
        Column("parameters", "parameters", ","),
        Column("gmacs", "GMACs"),
        Column("side", "picture / px"),
        Column("trained_on", "trained on"),
        Column("top1", "top-1 %"),
        Column("top5", "top-5 %"),
        Column("weights", "weights"),
    ),
    "parity": (
        Column("variant", "variant"),
        Column("height", "height"),
        Column("width", "width"),
        Column("logits", "logits", ".1e"),
        Column("pooled", "pooled vector", ".1e"),
        Column("maps", "worst feature map", ".1e"),
    ),
    "cpu": (
        Column("model", "model"),
        Column("milliseconds", "median / ms", ".1f"),
        Column("fastest", "fastest / ms", ".1f"),
        Column("relative_to_convnext_tiny", "time relative to convnext_tiny's", ".2f"),
        Column("added", "added", ".1%"),
    ),
    "cpu_formats": (
        Column("model", "model"),
        Column("way", "way"),
        Column("dtype", "type"),
        Column("milliseconds", "median / ms", ".1f"),
        Column("fastest", "fastest / ms", ".1f"),
        Column("ratio", "ratio", ".2f"),
    ),
    "cifar10": (
        Column("model", "model"),
        Column("parameters", "parameters", ","),
        Column("bytes", "file / bytes", ","),
        Column("pictures", "test pictures", ","),
        Column("top1", "top-1 %", ".2f"),
        Column("top5", "top-5 %", ".2f"),
    ),
    "gpu_inference": (
        Column("model", "model"),
        Column("way", "way"),
        Column("picture", "picture / px"),
        Column("batch", "batch"),
        Column("images_per_second", "images/s", ","),
        Column("megapixels_per_second", "megapixels/s", ","),
        Column("milliseconds", "median / ms", ".2f"),
        Column("p90", "p90 / ms", ".2f"),
        Column("peak_mib", "peak / MiB", ","),
        Column("relative", "relative to convnext_tiny's best", ".2f"),
    ),
    "gpu_front": (
        Column("model", "model"),
        Column("top1", "published top-1 %", ".1f"),
        Column("picture", "picture / px"),
        Column("way", "fastest way"),
        Column("images_per_second", "images/s", ","),
        Column("relative", "relative to convnext_tiny", ".2f"),
    ),
    "gpu_rivals": (
        Column("model", "model"),
        Column("top1", "published top-1 %", ".1f"),
        Column("relative", "relative to convnext_tiny", ".2f"),
        Column("rival", "fastest of timm's that is as accurate"),
        Column("rival_top1", "its top-1 %", ".1f"),
        Column("rival_relative", "relative to convnext_tiny", ".2f"),
        Column("ratio", "ours over it", ".2f"),
        Column("over_large", f"ours over {LARGE}", ".2f"),
        Column("over_original", "ours over the original", ".2f"),
    ),
    "gpu_pixels": (
        Column("model", "model"),
        Column("picture", "picture / px"),
        Column("batch", "batch"),
        Column("megapixels_per_second", "megapixels/s", ","),
        Column("usual", "at 224 px, batch 128", ","),
        Column("ratio", "ratio", ".2f"),
        Column("as_many", "at 224 px, as many pixels", ","),
        Column("even", "ratio", ".2f"),
        Column("work", "multiply-adds a pixel, ratio", ".2f"),
    ),
    "gpu_latency": (
        Column("model", "model"),
        Column("milliseconds", "ms", ".2f"),
        Column("relative", "speed relative to convnext_tiny", ".2f"),
        Column("original", "the original / ms", ".2f"),
        Column("over_original", "its time over ours", ".1f"),
    ),
    "gpu_training_rivals": (
        Column("model", "model"),
        Column("way", "way"),
        Column("images_per_second", "images/s", ","),
        Column("peak_gib", "peak / GiB", ".1f"),
        Column("original", "the original's images/s, eager", ","),
        Column("original_peak_gib", "its peak / GiB", ".1f"),
        Column("over_original", "ours over the original", ".2f"),
    ),
    "others_h200": (
        Column("model", "model"),
        Column("kind", "what"),
        Column("way", "way"),
        Column("images_per_second", "images/s", ","),
        Column("relative", "relative to compiled convnext_tiny", ".2f"),
        Column("top1", "published top-1 %", ".1f"),
    ),
    "gpu_accuracy": (
        Column("way", "way"),
        Column("dtype", "type"),
        Column("top1", "top-1 %", ".2f"),
        Column("logit_error", "relative error of the logits", ".1e"),
    ),
    "float8_error": (
        Column("model", "model"),
        Column("dtype", "products"),
        Column("top1", "top-1 %", ".2f"),
        Column("logit_error", "relative error of the logits", ".1e"),
    ),
    "first_result": (
        Column("model", "model"),
        Column("mode", "mode"),
        Column("batch_1_s", "first result, batch 1 / s", ".1f"),
        Column("batch_128_s", "then batch 128 / s", ".1f"),
        Column("batch_129_s", "then batch 129 / s", ".1f"),
    ),
    "gpu_training": (
        Column("model", "model"),
        Column("way", "way"),
        Column("images_per_second", "images/s", ","),
        Column("milliseconds", "ms a step", ".1f"),
        Column("peak_gib", "peak / GiB", ".2f"),
        Column("relative_to_convnext_tiny", "relative to compiled convnext_tiny", ".2f"),
    ),
    "precision": (
        Column("precision", "autocast"),
        Column("scan", "scan"),
        *(Column(f"seed_{seed}", f"seed {seed}, top-1 %", ".2f") for seed in range(3)),
        Column("difference", "mean difference from the first, seed by seed", "+.2f"),
    ),
    "scan": (
        Column("batch", "sequences"),
        Column("length", "tokens"),
        Column("channels", "channels"),
        Column("dtype", "type"),
        Column("backend", "backend"),
        Column("forward_us", "forward / us", ".1f"),
        Column("sequential_us", "without chunks / us", ".1f"),
        Column("training_us", "forward and backward / us", ".1f"),
    ),
    "formats": (*COMPARED, Column("top1", "top-1 %", ".2f"), *TIMED),
    "formats_T": (*COMPARED, *TIMED),  # random weights have no accuracy
    "onnx_variants": (
        Column("model", "model"),
        Column("side", "picture / px"),
        Column("nodes", "nodes", ","),
        Column("bytes", "file / bytes", ","),
        Column("bytes_beside", "weights beside it / bytes", ","),
        Column("error", "error", ".1e"),
        Column("seconds_to_write", "to write / s"),
        Column("seconds_to_open", "to open / s", ".1f"),
        Column("milliseconds", "ms"),
    ),
    "onnx_gpu": (
        Column("model", "model"),
        Column("way", "way"),
        Column("dtype", "type"),
        Column("error", "error", ".1e"),
        Column("top1", "top-1 %", ".2f"),
        Column("milliseconds_1", "batch 1 / ms", ".1f"),
        Column("milliseconds_128", "batch 128 / ms", ".1f"),
    ),
    "huggingface_trainer": (
        Column("model", "model"),
        Column("pictures", "training pictures", ","),
        Column("before", "top-1 before / %", ".2f"),
        Column("after", "after / %", ".2f"),
    ),
    "ablation": (
        Column("mixer_order", "mixer order"),
        Column("dt_bias_init", "step-bias start"),
        *(Column(f"seed_{seed}", f"seed {seed}", ".2f") for seed in range(3)),
        Column("mean", "mean of the seeds that all have", ".2f"),
        Column("difference", "mean difference from the first, seed by seed", "+.2f"),
        Column("smallest_difference", "smallest", "+.2f"),
        Column("largest_difference", "largest", "+.2f"),
    ),
}


def best_ways(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each model at batch 128, in its fastest way that keeps its published accuracy; the fastest first.

    By the ratio to the reference of the same run, since rows may come from two.
    """
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["batch"] == 128 and row["top1"] is not None:
            known = best.setdefault(row["model"], row)
            best[row["model"]] = max(known, row, key=lambda candidate: candidate["relative"])
    return sorted(best.values(), key=lambda row: (-row["relative"], -row["images_per_second"]))


def rivals(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each model of ours beside the fastest of timm's that is at least as accurate, convnext_large and the original.

    Args:
        rows: of our run.
        others: of the run of the original, to which only ratios to convnext_tiny compare. They are taken of images per
            second, since `relative` is rounded.
    """
    best = best_ways(rows)
    peers = [row for row in best if not row["model"].startswith(OURS)]
    speed = {row["model"]: row["images_per_second"] for row in best}
    originals = {row["model"]: row["images_per_second"] for row in others if row["kind"] == "original"}
    reference = next((row["images_per_second"] for row in others if row["model"] == REFERENCE), None)
    pairs = []
    for row in best:
        name = row["model"]
        if not name.startswith(OURS):
            continue
        pair = {key: row[key] for key in ("model", "top1", "relative")}
        rival = next((peer for peer in peers if peer["top1"] >= row["top1"]), None)
        if rival is not None:
            pair |= {"rival": rival["model"], "rival_top1": rival["top1"], "rival_relative": rival["relative"]}
            pair["ratio"] = speed[name] / speed[rival["model"]]
        if LARGE in speed:
            pair["over_large"] = speed[name] / speed[LARGE]
        if name in originals and REFERENCE in speed and reference:
            pair["over_original"] = (speed[name] / speed[REFERENCE]) / (originals[name] / reference)
        pairs.append(pair)
    return pairs


def by_pixels(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Larger pictures beside those of 224 px, through the same network: 128, and as many as have the same pixels."""
    usual = {
        (row["model"], row["batch"]): row["megapixels_per_second"]
        for row in rows
        if row["way"] == "optimized" and row["picture"] == USUAL
    }
    large = [row for row in rows if row["model"].startswith(OURS) and row["picture"] != USUAL]
    pairs = []
    for row in large:
        same = "_".join(row["model"].split("_")[:3])
        height, width = map(int, row["picture"].split(" x "))
        work = _work_of_pixel(row["model"], height, width) / _work_of_pixel(same, 224, 224)
        equal = round(row["batch"] * height * width / 224**2)
        if not {(same, 128), (same, equal)} <= usual.keys():
            raise TableError(f"gpu_inference.json has no batches of 128 and {equal} of {same}; measure them with it.")
        as_many = usual[same, equal]
        speed, many = row["megapixels_per_second"], usual[same, 128]
        pair = {"usual": many, "ratio": speed / many, "as_many": as_many, "even": speed / as_many, "work": work}
        pairs.append(row | pair)
    return pairs


def _work_of_pixel(model: str, height: int, width: int) -> float:
    """Multiply-adds, padding included."""
    return count_complexity(create_model(model, device="meta"), (height, width)).macs / (height * width)


def latencies(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One picture through ours, beside compiled convnext_tiny in the same run, and through the original in its run."""
    single = {(row["model"], row["way"]): row for row in rows if row["batch"] == 1 and row["picture"] == USUAL}
    pairs = []
    for row in others:
        ours = single.get((row["model"], "optimized"))
        if row["kind"] == "original" and ours is not None:
            numbers = {
                "relative": single[REFERENCE, "compile"]["milliseconds"] / ours["milliseconds"],
                "original": row["milliseconds"],
                "over_original": row["milliseconds"] / ours["milliseconds"],
            }
            pairs.append({key: ours[key] for key in ("model", "milliseconds")} | numbers)
    return pairs


def training_rivals(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Training ours and the original, by the ratios to convnext_tiny without a compiler, which both runs timed."""
    ours = {(row["model"], row["way"]): row for row in rows}
    speed = {row["model"]: row["images_per_second"] for row in others}
    pairs = []
    for row in others:
        for way in ("compiled", "eager"):
            own = ours.get((row["model"], way))
            if row["kind"] == "original" and own is not None:
                relative = own["images_per_second"] / ours[REFERENCE, "eager"]["images_per_second"]
                numbers = {
                    "original": row["images_per_second"],
                    "original_peak_gib": row["peak_gib"],
                    "over_original": relative / (row["images_per_second"] / speed[REFERENCE]),
                }
                pairs.append({key: own[key] for key in ("model", "way", "images_per_second", "peak_gib")} | numbers)
    return pairs


# Tables that show a part of other files; the origin of the first stands below the table.
PARTS: dict[str, tuple[tuple[str, ...], Callable[..., list[dict[str, Any]]]]] = {
    "gpu_front": (("gpu_inference",), best_ways),
    "gpu_rivals": (("gpu_inference", "others_h200"), rivals),
    "gpu_pixels": (("gpu_inference",), by_pixels),
    "gpu_latency": (("gpu_inference", "others_latency_h200"), latencies),
    "gpu_training_rivals": (("gpu_training", "others_training_h200"), training_rivals),
}
SHOWN_VERSIONS = ("python", "torch", "timm")  # the result has the others too


class TableError(ValueError):
    """A document or a result that the tables cannot be made of; the message names it."""


def render(name: str, results: Path = RESULTS) -> str:
    """The Markdown of one block, with a line break at its end.

    Raises:
        TableError: no such table, or a result without what it needs.
    """
    if name not in TABLES:
        raise TableError(f"There is no table {name!r}; there are {', '.join(TABLES)}.")
    if name == "models":
        return "\n".join(_table(_weights(), TABLES[name])) + "\n"
    files, part = PARTS.get(name, ((name,), list))
    paths = [results / f"{file}.json" for file in files]
    if not all(path.exists() for path in paths):
        return f"{UNMEASURED}\n"
    contents = [_read(path) for path in paths]
    path, result = paths[0], contents[0]
    rows, columns = part(*(content["rows"] for content in contents)), TABLES[name]
    known = {key for row in rows for key in row}
    if absent := [column.key for column in columns if column.key not in known]:
        raise TableError(f"The rows of {path} lack {', '.join(absent)}; they have {', '.join(sorted(known))}.")
    note = [result["note"], ""] if result["note"] else []
    return "\n".join([*_table(rows, columns), "", *note, _provenance(result)]) + "\n"


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    needed = {"rows", "command", "commit", "device", "versions", "date", "note"}
    if absent := sorted(needed - set(result)):
        raise TableError(f"{path} lacks {', '.join(absent)}.")
    return result


def fill(text: str, document: str, results: Path = RESULTS) -> str:
    """`text` with every block rendered anew.

    Raises:
        TableError: a marker without its partner, or a block that cannot be rendered.
    """
    paired = [marker for block in BLOCK.finditer(text) for marker in (block["begin"].strip(), block["end"])]
    if paired != MARKER.findall(text):
        raise TableError(f"{document}: every begin marker needs its end marker, and nothing between them another one.")
    return BLOCK.sub(lambda block: block["begin"] + "\n" + render(block["name"], results) + "\n" + block["end"], text)


def documents() -> list[Path]:
    """What may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main(argv: list[str] | None = None) -> int:
    """Write the tables, or with --check tell which are out of date."""
    parser = argparse.ArgumentParser(description="Fill the tables of README.md and docs/ from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when something would change")
    options = parser.parse_args(argv)
    stale = []
    for path in documents():
        before = path.read_text(encoding="utf-8")
        after = fill(before, str(path.relative_to(ROOT)))
        if after == before:
            continue
        stale.append(path)
        if not options.check:
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(after, encoding="utf-8")
            os.replace(temporary, path)
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'out of date' if options.check else 'written'}")
    return 1 if options.check and stale else 0


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> list[str]:
    numeric = [all(_is_number(row.get(column.key)) for row in rows) for column in columns]
    return [
        _line(column.heading for column in columns),
        _line("---:" if number else "---" for number in numeric),
        *(_line(_cell(row.get(column.key), column.form) for column in columns) for row in rows),
    ]


def _weights() -> list[dict[str, Any]]:
    """The variants that have weights, with the figures published or recorded with them."""
    return [
        {
            "model": f"`{spec.variant}`",
            "parameters": spec.parameters,
            "gmacs": spec.gmacs,
            "side": VARIANTS[spec.variant].preprocessing.img_size[0],
            "trained_on": spec.trained_on,
            "top1": spec.top1,
            "top5": spec.top5,
            "weights": "in the package" if spec.url is None else f"[{spec.license}]({spec.url})",
        }
        for spec in WEIGHTS.values()
    ]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):  # a size or a list of seeds
        return ", ".join(str(entry) for entry in value)
    return format(value, form if _is_number(value) else "").replace("|", "\\|")


def _provenance(result: dict[str, Any]) -> str:
    versions = ", ".join(
        f"{package} {version}" for package, version in result["versions"].items() if package in SHOWN_VERSIONS
    )
    return (
        f"<sub>Measured on {result['device']}, {result['date']}, commit {result['commit']}, {versions}: "
        f"`{result['command']}`</sub>"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TableError as error:
        sys.exit(f"readme_tables: {error}")
