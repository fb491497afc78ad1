"""Training steps on a GPU: images a second and peak memory, ours beside a peer of timm's in one run.

    python benchmarks/gpu_training.py

A step is forward, loss, backward and a fused AdamW update on random pictures that lie on the GPU, in bfloat16 autocast
and channels-last; compiled ways replay CUDA graphs. Steps follow each other as in training, where the host prepares the
next one while the GPU computes: what is timed are rounds of them. Each way is measured by itself in a process of its
own, so that the peak is its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F

from apart import json_of
from results_file import print_rows, write_results

BATCH, ROUNDS = 128, 5
# Model, and how: compiled, with gradient checkpointing.
WAYS = (
    ("convnext_tiny", True, False),  # what the others are compared with
    ("convnext_tiny", False, False),
    ("mamba_vision_T", True, False),
    ("mamba_vision_T", True, True),
    ("mamba_vision_B", True, False),
    ("mamba_vision_T", False, False),
)


def measure(name: str, compiled: bool, checkpointing: bool, steps: int) -> dict[str, Any]:
    """One row."""
    if name.startswith("mamba_vision"):
        from mambavision import create_model

        model = create_model(name, device="cuda")
    else:
        import timm

        model = timm.create_model(name).cuda()
    torch.backends.cudnn.benchmark = True  # as `mambavision train` does
    model = model.train().to(memory_format=torch.channels_last)
    model.set_grad_checkpointing(checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    # A step has hundreds of launches, which can take the host longer than the GPU: graphs replay them as one.
    run = torch.compile(model, mode="reduce-overhead") if compiled else model
    images = torch.randn(BATCH, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (BATCH,), device="cuda")

    def step() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    step()  # in which cuDNN tries its algorithms, with more memory than later
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(5):  # graphs take their memory while they are recorded, so these count
        step()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            loss = step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / steps)
    if not torch.isfinite(loss):
        raise RuntimeError(f"The loss of {name} is {loss.item()}.")
    milliseconds = statistics.median(times)
    return {
        "model": name,
        "way": ("compiled" if compiled else "eager") + (", checkpointing" if checkpointing else ""),
        "images_per_second": round(1e3 * BATCH / milliseconds),
        "milliseconds": round(milliseconds, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def measure_apart(number: int, steps: int) -> dict[str, Any]:
    """Row `number` of WAYS, from a process of its own."""
    row: dict[str, Any] = json_of(__file__, "--only", number, "--steps", steps)
    return row


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="of a round")
    parser.add_argument("--compilers", type=int, default=4, help="processes that compile side by side beforehand")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)  # a row of WAYS, in its own process
    arguments = parser.parse_args()
    if arguments.only is not None:
        print(json.dumps(measure(*WAYS[arguments.only], arguments.steps)))
        return
    with ThreadPoolExecutor(arguments.compilers) as compilers:  # fills the compilers' caches; these times are nobody's
        list(compilers.map(lambda number: measure_apart(number, 1), range(len(WAYS))))
    rows = []
    for number in range(len(WAYS)):
        rows.append(measure_apart(number, arguments.steps))
        rows[-1]["relative_to_convnext_tiny"] = round(rows[-1]["images_per_second"] / rows[0]["images_per_second"], 2)
        _write(rows, arguments.steps)
    print_rows(rows)


def _write(rows: list[dict[str, Any]], steps: int) -> None:
    note = f"Batch {BATCH}, 224 px, bfloat16 autocast, channels-last, fused AdamW, CUDA graphs where compiled; "
    note += f"median of {ROUNDS} rounds of {steps} steps."
    write_results("gpu_training", rows, note=note)


if __name__ == "__main__":
    main()
