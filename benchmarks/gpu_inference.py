"""Inference on a GPU: our variants through `optimize` beside peers of timm's in their best way, in one run.

    python benchmarks/gpu_inference.py

bfloat16, random weights and pictures that lie on the GPU, by the protocol of `mambavision benchmark`. Peers run eagerly
and by torch.compile with CUDA graphs, both channels-last; the faster way counts. Large pictures have rows of their own,
to be compared by pixels. Rows are written as they come.
`benchmarks/front.py` draws them over accuracy.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from mambavision.measure.subjects import prepare
from mambavision.measure.timing import describe_protocol, measure
from mambavision.ops.backend import Situation
from mambavision.ops.float8 import refuse_float8_kernels
from mambavision.weights import WEIGHTS
from results_file import write_results

OURS = ("T", "T2", "S", "B", "L", "L2")
WIDE, FLOAT8 = ("L", "L2"), "optimized-float8"  # of which the 8-bit mode is timed too
TUNED, FULL = ("T", "L"), "optimized-full"  # and those that show what timing the tiles gains
REFERENCE = "convnext_tiny"


class Peer(NamedTuple):
    """Top-1 on ImageNet-1K as the authors publish it, and the side of the pictures in pixels that it holds for."""

    top1: float
    side: int = 224


# By timm's names: trained on ImageNet-1K alone, without distillation. Those of hiera were first trained there without
# labels. EfficientNetV2 has no published accuracy at 224 px.
PEERS = {
    "convnext_tiny": Peer(82.1),
    "convnext_large": Peer(84.3),
    "caformer_s18": Peer(83.6),
    "hiera_small_224": Peer(83.8),
    "mambaout_tiny": Peer(82.7),
    "swin_tiny_patch4_window7_224": Peer(81.3),
    "deit3_base_patch16_224": Peer(83.8),
    "convnext_small": Peer(83.1),
    "hiera_tiny_224": Peer(82.8),
    "nextvit_base": Peer(83.2),
    "convnext_base": Peer(83.8),
    "caformer_s36": Peer(84.5),
    "caformer_m36": Peer(85.2),
    "caformer_b36": Peer(85.5),
    "hiera_base_224": Peer(84.5),
    "hiera_base_plus_224": Peer(85.2),
    "hiera_large_224": Peer(86.1),
    "maxvit_tiny_tf_224": Peer(83.6),
    "maxvit_small_tf_224": Peer(84.5),
    "regnety_160": Peer(82.9),
    "tiny_vit_21m_224": Peer(83.1),
    "tf_efficientnetv2_s": Peer(83.9, 384),
    "swin_small_patch4_window7_224": Peer(83.0),
    "swin_base_patch4_window7_224": Peer(83.5),
    "mambaout_small": Peer(84.1),
    "mambaout_base": Peer(84.2),
    "nextvit_small": Peer(82.5),
    "nextvit_large": Peer(83.6),
    "deit3_small_patch16_224": Peer(81.4),
    "deit3_medium_patch16_224": Peer(83.0),
    "deit3_large_patch16_224": Peer(84.9),
    "maxvit_base_tf_224": Peer(84.9),
    "maxvit_large_tf_224": Peer(85.2),
}
LATENCY_OF = ("convnext_tiny",)  # peers that are timed with one picture too
SIDE = 224
LARGE = (("mamba_vision_L2_512_21k", (512, 512), 32), ("mamba_vision_T", (1024, 2048), 1))
DTYPE = "bfloat16"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement (default: 1)")
    parser.add_argument("--peers", nargs="*", metavar="NAME", default=list(PEERS), choices=PEERS, help="default: all")
    parser.add_argument("--compile-only", action="store_true", help="fill the compilers' caches and measure nothing")
    parser.add_argument("--ours", nargs="*", default=list(OURS), choices=OURS, help="default: all")
    parser.add_argument(
        "--large",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="large pictures as well, of those of ours that are measured",
    )
    arguments = parser.parse_args()
    device = torch.device("cuda")
    square = (SIDE, SIDE)
    # What is published of ours holds for another size or 8 bits no more.
    published = {(spec.variant, "optimized", square): spec.top1 for spec in WEIGHTS.values()}
    batches: dict[str, tuple[int, ...]] = {f"mamba_vision_{name}": (1, 128) for name in arguments.ours}
    large = [job for job in LARGE if _same(job[0]) in batches and arguments.large]
    for name, (height, width), batch in large:  # beside each a batch of as many pixels
        batches[_same(name)] += (round(batch * height * width / SIDE**2),)
    jobs = [(name, "optimized", square, sizes) for name, sizes in batches.items()]
    if fault := refuse_float8_kernels(Situation("cuda", torch.float8_e4m3fn)):
        print(f"{FLOAT8} is left out: {fault}")
    else:
        jobs += [(f"mamba_vision_{name}", FLOAT8, square, (1, 128)) for name in WIDE if name in arguments.ours]
    jobs += [(f"mamba_vision_{name}", FULL, square, (1, 128)) for name in TUNED if name in arguments.ours]
    jobs += [(name, "optimized", size, (batch,)) for name, size, batch in large]
    for name in arguments.peers:
        size = (PEERS[name].side, PEERS[name].side)
        jobs += [(name, way, size, (1, 128) if name in LATENCY_OF else (128,)) for way in ("compile", "eager")]
    if REFERENCE in arguments.peers:  # first, so that all else has its ratio from the start
        jobs.sort(key=lambda job: job[0] != REFERENCE)
    rows: list[dict[str, Any]] = []
    for name, way, size, batch_sizes in jobs:
        start = time.perf_counter()
        subject = prepare(name, way=way, dtype=DTYPE, device=device, img_size=None if size == square else size)
        for batch_size in batch_sizes:
            if arguments.compile_only:
                with torch.inference_mode():
                    subject.run(subject.pictures(batch_size))
                continue
            found = measure(subject, batch_size, seconds=arguments.seconds)
            rows.append(
                {
                    "model": name,
                    "way": way,
                    "picture": f"{size[0]} x {size[1]}",
                    "batch": batch_size,
                    "images_per_second": round(found.images_per_second),
                    "megapixels_per_second": round(found.images_per_second * size[0] * size[1] / 1e6),
                    "milliseconds": round(found.median_ms, 3),
                    "p90": round(found.p90_ms, 3),
                    "peak_mib": round(found.peak_mib or 0),
                    "top1": PEERS[name].top1 if name in PEERS else published.get((name, way, size)),
                }
            )
        del subject
        torch.cuda.empty_cache()
        torch.compiler.reset()
        print(f"{name}, {way}: {time.perf_counter() - start:.1f} s", flush=True)
        if rows:
            _write(rows, device, arguments.seconds)
    if rows:
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console(width=150).print(table)


def _same(large: str) -> str:
    """The network of ours that a large picture's is, for pictures of the usual size."""
    return "_".join(large.split("_")[:3])


def _write(rows: list[dict[str, Any]], device: torch.device, seconds: float) -> None:
    """All rows so far, with each one's ratio to the reference's best at the same batch size.

    Pictures are of one size, but for peers: theirs are of the size at which they reach their accuracy.
    """
    for row in rows:
        keys = ("batch",) if row["model"] in PEERS else ("batch", "picture")
        same = [other for other in rows if other["model"] == REFERENCE and all(other[key] == row[key] for key in keys)]
        if same:
            best = max(other["images_per_second"] for other in same)
            row["relative"] = round(row["images_per_second"] / best, 2)
    protocol = describe_protocol(device, seconds)
    note = f"{DTYPE}; {protocol['protocol']}. Clocks: {protocol['clocks']}."
    write_results("gpu_inference", rows, note=note)


if __name__ == "__main__":
    main()
