"""Order of the mixers and start of the step bias, compared on CIFAR-10.

    python benchmarks/ablation.py --data data/cifar10

Trains the small variant with each choice and seed on 90 % of the training pictures and evaluates it on the other 10 %;
the test pictures take no part. Everything else is the recipe of the model that ships, cut to 30 epochs. A run that has
finished in the output folder is not repeated, so the comparison can be continued, and --collect only tabulates.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from results_file import write_results

RECIPE = Path(__file__).parents[1] / "recipes" / "cifar10_nano.yaml"
EPOCHS = 30
CHOICES = {
    "mamba_first": {"mixer_order": "mamba_first", "dt_bias_init": "zero"},
    "attention_first": {"mixer_order": "attention_first", "dt_bias_init": "zero"},
    "mamba_only": {"mixer_order": "mamba_only", "dt_bias_init": "zero"},
    "attention_only": {"mixer_order": "attention_only", "dt_bias_init": "zero"},
    "log_uniform": {"mixer_order": "mamba_first", "dt_bias_init": "log_uniform"},
}


def train(data: Path, folder: Path, choice: str, seed: int) -> None:
    """One run, through the command that users have."""
    command = [sys.executable, "-m", "mambavision", "train", "--config", RECIPE, "--data", data, "--val-split", "0.1"]
    command += ["--epochs", EPOCHS, "--optim.warmup_epochs", 3, "--runtime.eval_every", EPOCHS, "--seed", seed]
    command += ["--model.overrides", json.dumps({"drop_path_rate": 0.1, **CHOICES[choice]}), "--output", folder]
    subprocess.run([str(part) for part in command], check=True)


def held_out_top1(folder: Path) -> float | None:
    """Accuracy after the last epoch, in percent; None while the run is unfinished."""
    path = folder / "epochs.csv"
    if not path.exists():
        return None
    rows = list(csv.DictReader(path.open()))
    return float(rows[-1]["val_top1"]) if len(rows) == EPOCHS else None


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row its mean and its difference from the first row, over the seeds that every row has."""
    shared = sorted(set.intersection(*({key for key in row if key.startswith("seed_")} for row in rows)))
    for row in rows:
        row["shared_seeds"] = len(shared)
        row["mean"] = round(statistics.mean(row[seed] for seed in shared), 2)
        differences = [row[seed] - rows[0][seed] for seed in row if seed.startswith("seed_") and seed in rows[0]]
        row["difference"] = round(statistics.mean(differences), 2)
        row["smallest_difference"], row["largest_difference"] = round(min(differences), 2), round(max(differences), 2)


def main() -> None:
    """Train what is missing, tabulate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the CIFAR-10 training pictures")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--collect", action="store_true", help="tabulate finished runs, train nothing")
    parser.add_argument("--device", help="what the runs were made on, where that is not this machine")
    arguments = parser.parse_args()
    if not arguments.collect and arguments.data is None:
        parser.error("--data says where CIFAR-10 is")

    rows = []
    for choice, settings in CHOICES.items():
        found = {}
        for seed in range(arguments.seeds):
            folder = arguments.output / f"{choice}_s{seed}"
            if not arguments.collect and held_out_top1(folder) is None:
                train(arguments.data, folder, choice, seed)
            if (top1 := held_out_top1(folder)) is not None:
                found[f"seed_{seed}"] = round(top1, 2)
        if found:
            rows.append({**settings, **found})
    if not rows:
        parser.error(f"no finished run in {arguments.output}")
    compare(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(row.get(column, "-")) for column in columns))
    Console().print(table)
    write_results(
        "ablation",
        rows,
        note=f"mamba_vision_nano_32 on CIFAR-10, {EPOCHS} epochs (3 of warm-up) on 45,000 pictures, top-1 % on 5,000 "
        "held-out training pictures.",
        device=arguments.device,
    )


if __name__ == "__main__":
    main()
