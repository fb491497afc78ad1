"""Relative error of the network against the golden vectors of the original.

    python benchmarks/parity.py

For each variant and size with vectors in tests/golden: the largest relative norm of the difference over logits, pooled
vector and what the vectors keep of the four feature maps, in float32 on the CPU, with the weights of
tests/deterministic_weights.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mambavision import create_model
from results_file import write_results

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))
from deterministic_weights import deterministic_images, deterministic_state_dict  # noqa: E402  (found by the line above)


def relative(actual: torch.Tensor, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of the expected values."""
    truth = torch.from_numpy(np.asarray(expected)).double()
    return ((actual.double() - truth).norm() / truth.norm()).item()


def main() -> None:
    """Measure, print and write."""
    rows = []
    for path in sorted((TESTS / "golden").glob("mamba_vision_*.npz")):
        vectors = np.load(path)
        model = create_model(path.stem).eval()
        model.load_state_dict(deterministic_state_dict({name: t.shape for name, t in model.state_dict().items()}))
        for size in sorted({key.split("/")[0] for key in vectors}):
            batch, height, width = map(int, size.split("x"))
            with torch.inference_mode():
                final, maps = model.forward_intermediates(deterministic_images(batch, height, width))
                pooled = model.forward_head(final, pre_logits=True)
                logits = model.forward_head(final)
            of_maps = [
                relative(value, vectors[f"{size}/stage{stage}/{key}"])
                for stage, feature_map in enumerate(maps, start=1)
                for key, value in (("corner", feature_map[:, :8, -3:, -3:]), ("channel_mean", feature_map.mean((2, 3))))
            ]
            rows.append(
                {
                    "variant": path.stem,
                    "height": height,
                    "width": width,
                    "logits": relative(logits, vectors[f"{size}/logits"]),
                    "pooled": relative(pooled, vectors[f"{size}/pooled"]),
                    "maps": max(of_maps),
                }
            )
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.1e}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    write_results(
        "parity",
        rows,
        note="Relative norm of the difference to the original's outputs, float32, CPU; maps: the largest.",
    )


if __name__ == "__main__":
    main()
