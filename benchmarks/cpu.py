"""Latency on a CPU, float32, against timm's peers in one run.

    python benchmarks/cpu.py

All models take turns, round after round, so that a slow moment of the machine hits all alike; the figure is the median
over the rounds. `mamba_vision_T without its scan` is the same network whose scan gives back its input: what the scan
adds is the difference, as a share of the network without it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from mambavision import create_model
from mambavision.layers import mixer
from results_file import write_results

OURS = ("mamba_vision_T", "mamba_vision_S", "mamba_vision_B")
PEERS = ("convnext_tiny", "swin_tiny_patch4_window7_224", "mambaout_tiny")
WITHOUT_SCAN = "mamba_vision_T without its scan"


def without_scan(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """`model` with every selective scan giving back its input."""
    scan = mixer.selective_scan

    def forward(images: torch.Tensor) -> torch.Tensor:
        mixer.selective_scan = lambda x, dt, A, B, C, D, dt_bias, backend: x  # noqa: ARG005  (the scan's signature)
        try:
            return model(images)
        finally:
            mixer.selective_scan = scan

    return forward


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images = torch.randn(arguments.batch_size, 3, 224, 224)

    models: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {name: create_model(name).eval() for name in OURS}
    models[WITHOUT_SCAN] = without_scan(models["mamba_vision_T"])
    models |= {name: timm.create_model(name).eval() for name in PEERS}
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for round_number in range(arguments.rounds + 3):
            for name, model in models.items():
                start = time.perf_counter()
                model(images)
                if round_number >= 3:  # warm-up
                    times[name].append(1e3 * (time.perf_counter() - start))

    median = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        {
            "model": name,
            "milliseconds": round(median[name], 1),
            "fastest": round(min(times[name]), 1),
            "relative_to_convnext_tiny": round(median[name] / median["convnext_tiny"], 2),
        }
        for name in models
    ]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    console = Console()
    console.print(table)
    # pairs of the same round: their ratio is steadier than that of the medians
    pairs = zip(times["mamba_vision_T"], times[WITHOUT_SCAN], strict=True)
    added = statistics.median(whole / without - 1 for whole, without in pairs)
    console.print(f"The scan adds {100 * added:.1f} % to mamba_vision_T's forward pass.")
    write_results(
        "cpu" if arguments.batch_size == 1 else f"cpu_batch{arguments.batch_size}",
        [*rows, {"model": "what the scan adds to mamba_vision_T", "milliseconds": None, "added": round(added, 3)}],
        note=f"Eager float32, batch {arguments.batch_size}, 224 px, median of {arguments.rounds} interleaved rounds.",
    )


if __name__ == "__main__":
    main()
