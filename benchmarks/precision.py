"""Does training end as well in half precision, and through the fast scan, as in float32? CIFAR-10, short runs.

    python benchmarks/precision.py data/cifar10

Trains the small variant with each type of autocast and scan, and each seed, and evaluates it on the test pictures; no
setting is chosen by them. A run that meets a non-finite loss stops this script. Runs may go side by side, since no time
is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from apart import json_of
from mambavision.data.config import AugmentConfig, DataConfig
from mambavision.engine.config import LossConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from mambavision.engine.train import TrainingRun
from mambavision.layers.mixer import MambaVisionMixer
from mambavision.ops.selective_scan import choose_backend
from results_file import print_rows, write_results

MODEL = "mamba_vision_nano_32"
# Autocast, and the scan; the first is what the others are compared with.
WAYS = (("float32", "auto"), ("bfloat16", "auto"), ("float16", "auto"), ("float32", "chunked"), ("bfloat16", "chunked"))
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def train(data: Path, precision: str, scan: str, seed: int, epochs: int, limit: int | None) -> float:
    """Top-1 on the test pictures after the last epoch, in percent."""
    with tempfile.TemporaryDirectory() as output:
        config = TrainConfig(
            model=ModelConfig(name=MODEL, overrides={"drop_path_rate": 0.0}),
            data=DataConfig(dir=str(data), cache=True, workers=2, class_names=CLASSES, limit_train=limit),
            # So few epochs learn nothing of pictures that are strongly varied.
            augment=AugmentConfig(crop="pad", auto_augment=None, color_jitter=0.0, erasing=0.0, mixup=0.0, cutmix=0.0),
            loss=LossConfig(smoothing=0.1),
            optim=OptimConfig(lr=2e-3, warmup_epochs=2, clip_grad=5.0, ema=0.99),
            runtime=RuntimeConfig(
                precision=precision,  # type: ignore[arg-type]  # one of WAYS
                channels_last=True,
                compile=torch.cuda.is_available(),
                compile_mode="reduce-overhead",
                eval_every=epochs,
            ),
            epochs=epochs,
            batch_size=256,
            seed=seed,
            output=output,
        )
        run = TrainingRun(config, Console(quiet=True))
        for module in run.model.modules():
            if isinstance(module, MambaVisionMixer):
                module.scan_backend = scan
        return run.run().final_top1


def train_apart(arguments: argparse.Namespace, way: tuple[str, str], seed: int) -> float:
    """`train` in a process of its own."""
    limit = ("--limit", arguments.limit) if arguments.limit else ()
    top1 = float(json_of(__file__, arguments.data, "--epochs", arguments.epochs, "--only", *way, seed, *limit))
    print(*way, f"seed {seed}: {top1:.2f} %", flush=True)
    return top1


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that get_cifar10.py wrote")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="so many training pictures only")
    parser.add_argument("--parallel", type=int, default=1, help="runs side by side")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)  # autocast, scan and seed, in this process
    arguments = parser.parse_args()
    if arguments.only:
        precision, scan, seed = arguments.only
        print(json.dumps(train(arguments.data, precision, scan, int(seed), arguments.epochs, arguments.limit)))
        return
    jobs = [(way, seed) for seed in range(arguments.seeds) for way in WAYS]
    found: dict[tuple[tuple[str, str], int], float] = {}
    with ThreadPoolExecutor(arguments.parallel) as pool:
        for job, running in [(job, pool.submit(train_apart, arguments, *job)) for job in jobs]:
            found[job] = running.result()
            write(found, arguments.epochs, arguments.limit, ended=len(found) == len(jobs))  # a run of hours may be cut
    print_rows(summary(found))


def summary(found: dict[tuple[tuple[str, str], int], float]) -> list[dict[str, Any]]:
    """A row a way: top-1 of each seed that has ended, their mean, and that of the differences from the first way."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        top1 = {seed: value for (other, seed), value in found.items() if other == way}
        both = [seed for seed in top1 if (WAYS[0], seed) in found]
        if not both:
            continue
        chosen = choose_backend(torch.empty(1, 1, 1, device=device), way[1]).backend.name
        row = {"precision": way[0], "scan": chosen, "mean": round(statistics.mean(top1.values()), 2)}
        row |= {f"seed_{seed}": value for seed, value in sorted(top1.items())}
        row["difference"] = round(statistics.mean(top1[seed] - found[WAYS[0], seed] for seed in both), 2)
        rows.append(row)
    return rows


def write(found: dict[tuple[tuple[str, str], int], float], epochs: int, limit: int | None, *, ended: bool) -> None:
    """Results so far."""
    pictures = f"{limit or 50_000:,} training pictures"
    note = (
        f"{MODEL}, CIFAR-10, {epochs} epochs on {pictures}, top-1 % on the 10,000 test pictures; differences are means "
        "of those seed by seed."
    )
    if not ended:
        note += " Not all runs had ended."
    write_results("precision", summary(found), note=note)


if __name__ == "__main__":
    main()
