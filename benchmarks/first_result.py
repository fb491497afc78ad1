"""How long the first result takes on a GPU: `optimize` in each of its modes, from empty caches of the compiler.

    python benchmarks/first_result.py

Each variant and mode in a process of its own, with a folder of its own for what Triton compiles. Counted is what a user
waits for after the network is there: the call of `optimize` and the first pictures' logits; the other times are those
of new batch sizes, for which some kernels are compiled anew.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from typing import Any

import torch

from apart import json_of
from mambavision import create_model
from mambavision.inference import optimize
from mambavision.inference.optimization import Mode
from results_file import print_rows, write_results

DEFAULT = ("mamba_vision_T", "mamba_vision_L2")
MODES: tuple[Mode, ...] = ("instant", "full")


def measure(name: str, mode: Mode) -> dict[str, Any]:
    """One row, in this process."""
    model = create_model(name, device="cuda").eval()
    images = torch.randn(129, 3, *model.config.preprocessing.img_size, device="cuda")
    with torch.inference_mode():
        model(images[:1])  # the CUDA context and its libraries are not ours to count
    row: dict[str, Any] = {"model": name, "mode": mode}
    start = time.perf_counter()
    network = optimize(model, mode=mode)
    for batch in (1, 128, 129):
        with torch.inference_mode():
            network(images[:batch])
        torch.cuda.synchronize()
        row[f"batch_{batch}_s"] = round(time.perf_counter() - start, 2)
        start = time.perf_counter()
    return row


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=list(DEFAULT), help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--here", choices=MODES, help=argparse.SUPPRESS)  # in this process, which is a child
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(*arguments.variants, arguments.here)))
        return
    rows = []
    for name in arguments.variants:
        for mode in MODES:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(json_of(__file__, name, "--here", mode, environment={"TRITON_CACHE_DIR": folder}))
    print_rows(rows)
    write_results(
        "first_result",
        rows,
        note=f"bfloat16, nothing compiled before, {os.cpu_count()} CPU cores; seconds to the first "
        "result, then to those of two further batch sizes.",
    )


if __name__ == "__main__":
    main()
