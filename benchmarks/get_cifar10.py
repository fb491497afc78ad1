"""CIFAR-10 as `mambavision train` and `evaluate` read it: DIR/train.npz and DIR/val.npz.

    python benchmarks/get_cifar10.py data/cifar10

torchvision downloads the archive of the University of Toronto (170 MB) and checks its sum.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10

from mambavision.files import replaced_when_done


def convert(archive: Path, folder: Path, *, download: bool = True) -> None:
    """Write the two files, each when it is complete: images uint8 (N, 32, 32, 3), labels (N,), class_names (10,)."""
    for name, train in (("train", True), ("val", False)):
        pictures = CIFAR10(str(archive), train=train, download=download)
        with replaced_when_done(folder / f"{name}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, images=pictures.data, labels=np.array(pictures.targets), class_names=pictures.classes)
        print(f"{folder / name}.npz: {len(pictures):,} pictures")


def main() -> None:
    """Download and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where train.npz and val.npz go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as archive:
        convert(Path(archive), folder)


if __name__ == "__main__":
    main()
