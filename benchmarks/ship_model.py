"""Put a finished training run into the package as the small model that ships.

    python benchmarks/ship_model.py RUN --data CIFAR10 --trained-on "one NVIDIA H200, torch 2.11"

Writes the weights in float16 (they are loaded as float32), evaluates exactly that file on the test pictures through
`mambavision evaluate`, and writes beside it the record (accuracy, hash, training settings with the seed, device) and
the log of the epochs. Only `final.safetensors` is taken: the last epoch's weights, chosen by no look at the test set.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from mambavision.models.classifier import MambaVision
from mambavision.models.complexity import count_complexity
from mambavision.weights import read_checkpoint, save_checkpoint
from mambavision.weights.table import ASSETS
from results_file import commit, versions, write_results

VARIANT = "mamba_vision_nano_32"


def main() -> None:
    """Convert, evaluate, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", type=Path, help="output folder of `mambavision train --config recipes/cifar10_nano.yaml`"
    )
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10; its val or test part is evaluated")
    parser.add_argument("--trained-on", required=True, help="device and versions of the training, in words")
    arguments = parser.parse_args()

    checkpoint = read_checkpoint(arguments.run / "final.safetensors")
    if checkpoint.config is None:
        parser.error(f"{checkpoint.path} does not carry its configuration")
    asset = ASSETS / f"{VARIANT}.safetensors"
    # The published classes are part of the file; the training settings stand in the record.
    save_checkpoint(asset, checkpoint.state_dict, checkpoint.config, dtype=torch.float16)
    if asset.stat().st_size > 8_000_000:
        parser.error(f"{asset} has {asset.stat().st_size:,} bytes; the package takes 8,000,000 at most")

    command = [
        sys.executable,
        "-m",
        "mambavision",
        "evaluate",
        "--checkpoint",
        str(asset),
        "--data",
        str(arguments.data),
    ]
    report = json.loads(
        subprocess.run(
            [*command, "--per-class", "--format", "json"], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
    )
    epochs = list(csv.DictReader((arguments.run / "epochs.csv").open()))
    complexity = count_complexity(MambaVision(checkpoint.config, device="meta").eval())
    training = checkpoint.extra["training"]
    training["data"]["dir"], training["output"] = (
        "CIFAR10",
        f"runs/{Path(training['output']).name}",
    )  # not the machine's
    record = {
        "model": VARIANT,
        "license": "Apache-2.0",
        "dataset": "CIFAR-10, its 50,000 training pictures alone",
        "top1": report["top1"],
        "top5": report["top5"],
        "loss": report["loss"],
        "pictures": report["count"],
        "per_class": report["per_class"],
        "parameters": complexity.parameters,
        "gmacs": round(complexity.macs / 1e9, 4),
        "sha256": hashlib.sha256(asset.read_bytes()).hexdigest(),
        "bytes": asset.stat().st_size,
        "trained_on": arguments.trained_on,
        "training_seconds": round(sum(float(epoch["seconds"]) for epoch in epochs)),
        "images_per_second": round(sum(float(epoch["images_per_second"]) for epoch in epochs) / len(epochs)),
        "training": training,
    }
    path = asset.with_suffix(".json")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    shutil.copyfile(arguments.run / "epochs.csv", asset.with_suffix(".log.csv"))
    write_results(
        "cifar10",
        [{key: record[key] for key in ("model", "parameters", "bytes", "top1", "top5", "loss", "pictures", "sha256")}],
        note="The file in the package on the 10,000 CIFAR-10 test pictures, float32, by `mambavision evaluate`.",
    )
    print(f"{asset.name}: {record['top1']:.2f} % top-1; commit {commit()}, {versions()}")


if __name__ == "__main__":
    main()
