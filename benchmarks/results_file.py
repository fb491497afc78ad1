"""How a benchmark shows and writes what it measured: rows, with device, versions, commit and command beside them."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mambavision.measure.timing import describe_device, installed_versions

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "accelerate",
    "executorch",
    "mambavision",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "timm",
    "torch",
    "torchvision",
    "transformers",
    "triton",
)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Show `rows` as a table with the columns of the first."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in rows[0]))
    Console().print(table)


def write_results(name: str, rows: list[dict[str, Any]], *, note: str, device: str | None = None) -> Path:
    """Write `rows` to results/NAME.json, replacing it when complete.

    Args:
        name: of the file, without suffix.
        rows: what was measured; column names to values.
        note: the protocol in a sentence or two.
        device: what it ran on; this machine's CPU or GPU by default.
    """
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "device": device or describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": versions(),
        "note": note,
        "rows": rows,
    }
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    print(f"wrote {path}")
    return path


def commit() -> str:
    """The checked-out commit, with `+changes` when files other than results and their tables differ from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        code = (":(top)", ":(top,exclude)benchmarks/results", ":(top,exclude)*.md")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no", "--", *code) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Python and the installed packages that matter."""
    return {"python": platform.python_version()} | installed_versions(PACKAGES)


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent, check=True, capture_output=True, text=True
    ).stdout.strip()
