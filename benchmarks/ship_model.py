"""Put a finished training run into the package as the small model that ships.

    python benchmarks/ship_model.py RUN --data data/cifar10 --trained-on "one NVIDIA H200, torch 2.11"

Writes the weights in float16 (they are loaded as float32), evaluates exactly that file on the test pictures through
`mambavision evaluate`, and writes beside it the record (accuracy, hash, training settings with the seed, device) and
the log of the epochs. Only `final.safetensors` is taken: the last epoch's weights, chosen by no look at the test set.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
from pathlib import Path

import torch

import cifar10
from mambavision.weights import read_checkpoint, save_checkpoint


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
    asset = cifar10.ASSET
    # The published classes are part of the file; the training settings stand in the record.
    save_checkpoint(asset, checkpoint.state_dict, checkpoint.config, dtype=torch.float16)
    if asset.stat().st_size > 8_000_000:
        parser.error(f"{asset} has {asset.stat().st_size:,} bytes; the package takes 8,000,000 at most")

    measured = cifar10.measure(arguments.data)
    epochs = list(csv.DictReader((arguments.run / "epochs.csv").open()))
    training = checkpoint.extra["training"]
    training["data"]["dir"] = "CIFAR10"  # not the machine's
    training["output"] = f"runs/{Path(training['output']).name}"
    record = {
        **measured,
        "license": "Apache-2.0",
        "dataset": "CIFAR-10, its 50,000 training pictures alone",
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
    print(f"{asset.name}: {measured['top1']:.2f} % top-1")
    cifar10.write(measured)


if __name__ == "__main__":
    main()
