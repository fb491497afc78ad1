"""Accuracy of the model in the package, of exactly the file that ships, on CIFAR-10's test pictures.

    python benchmarks/cifar10.py --data data/cifar10

Runs `mambavision evaluate`, as anybody would.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mambavision import create_model
from mambavision.models.complexity import count_complexity
from mambavision.weights.table import ASSETS
from results_file import write_results

VARIANT = "mamba_vision_nano_32"
ASSET = ASSETS / f"{VARIANT}.safetensors"


def measure(data: Path) -> dict[str, Any]:
    """What `mambavision evaluate` reports of the packaged file, and what that file is."""
    command = [sys.executable, "-m", "mambavision", "evaluate", "--checkpoint", ASSET, "--data", data, "--per-class"]
    finished = subprocess.run([*map(str, command), "--format", "json"], check=True, stdout=subprocess.PIPE, text=True)
    report = json.loads(finished.stdout)
    complexity = count_complexity(create_model(VARIANT, device="meta").eval())
    return {
        "model": VARIANT,
        "top1": report["top1"],
        "top5": report["top5"],
        "loss": report["loss"],
        "pictures": report["count"],
        "per_class": report["per_class"],
        "parameters": complexity.parameters,
        "gmacs": round(complexity.macs / 1e9, 4),
        "sha256": hashlib.sha256(ASSET.read_bytes()).hexdigest(),
        "bytes": ASSET.stat().st_size,
    }


def write(measured: dict[str, Any]) -> None:
    """The table's row."""
    columns = ("model", "parameters", "bytes", "top1", "top5", "loss", "pictures", "sha256")
    write_results(
        "cifar10",
        [{column: measured[column] for column in columns}],
        note="The file in the package on the 10,000 CIFAR-10 test pictures, float32, by `mambavision evaluate`.",
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10; its val or test part is evaluated")
    measured = measure(parser.parse_args().data)
    print(f"{ASSET.name}: {measured['top1']:.2f} % top-1")
    write(measured)


if __name__ == "__main__":
    main()
