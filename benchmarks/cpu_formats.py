"""The fastest way to run T and timm's convnext_tiny on a CPU, one picture at a time, all in one run.

    python benchmarks/cpu_formats.py

All ways take turns, round after round, so that a slow moment of the machine hits all alike. Before each the threads of
the one before get time to fall asleep, since onnxruntime's wait for work at full speed, and one call is not counted.
`optimized` is `optimize` of our network; `compile` is torch.compile with frozen weights, of the folded network and of
the other one, in channels-last.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from torch import nn

from mambavision import create_model
from mambavision.export.onnx import export_onnx
from mambavision.inference import optimize
from mambavision.inference.cpu import can_pack
from mambavision.inference.fuse import fuse
from results_file import write_results

PAUSE = 0.25  # seconds
OURS, PEER = "mamba_vision_T", "convnext_tiny"


def compiled(model: nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
    """`model` compiled for inference in channels-last; its weights become constants."""
    model = model.to(dtype).to(memory_format=torch.channels_last)
    return torch.compile(model, options={"freezing": True})


def session(path: Path, images: torch.Tensor) -> Callable[[], Any]:
    """A call of onnxruntime with all the threads that PyTorch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    runner = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {runner.get_inputs()[0].name: images.numpy()}
    return lambda: runner.run(None, feed)


def ways(images: torch.Tensor, folder: Path, *, compile_too: bool) -> dict[tuple[str, str, str], Callable[[], Any]]:
    """Calls by (model, way, type)."""
    ours, peer = create_model(OURS).eval(), timm.create_model(PEER).eval()
    export_onnx(ours, folder / "ours.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        torch.onnx.export(peer, (images,), folder / "peer.onnx", dynamo=True, verbose=False)
    found: dict[tuple[str, str, str], Callable[[], Any]] = {
        (OURS, "eager", "float32"): partial(ours, images),
        (PEER, "eager", "float32"): partial(peer, images),
        (OURS, "onnxruntime", "float32"): session(folder / "ours.onnx", images),
        (PEER, "onnxruntime", "float32"): session(folder / "peer.onnx", images),
    }
    for dtype in (torch.float32, torch.bfloat16) if can_pack(torch.bfloat16) else (torch.float32,):
        name, pictures = str(dtype).removeprefix("torch."), images.to(dtype)
        other = timm.create_model(PEER).eval().to(dtype).to(memory_format=torch.channels_last)
        found[OURS, "optimized", name] = partial(optimize(ours, dtype=dtype), pictures)
        found[PEER, "channels-last", name] = partial(other, pictures)
        if compile_too:
            found[OURS, "compile", name] = partial(compiled(fuse(ours), dtype), pictures)
            found[PEER, "compile", name] = partial(compiled(timm.create_model(PEER).eval(), dtype), pictures)
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    arguments = parser.parse_args()
    images = torch.randn(1, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        calls = ways(images, Path(folder), compile_too=not arguments.no_compile)
        times: dict[tuple[str, str, str], list[float]] = {key: [] for key in calls}
        for round_number in range(arguments.rounds + 3):
            for key, call in calls.items():
                time.sleep(PAUSE)
                call()
                start = time.perf_counter()
                call()
                if round_number >= 3:  # warm-up
                    times[key].append(1e3 * (time.perf_counter() - start))
    rows: list[dict[str, Any]] = [
        {
            "model": key[0],
            "way": key[1],
            "dtype": key[2],
            "milliseconds": round(statistics.median(values), 1),
            "fastest": round(min(values), 1),
        }
        for key, values in sorted(times.items(), key=lambda item: (item[0][2] != "float32", item[0][1], item[0][0]))
    ]
    for dtype in sorted({row["dtype"] for row in rows}, reverse=True):
        ours, peer = (
            min(row["milliseconds"] for row in rows if (row["model"], row["dtype"]) == (model, dtype))
            for model in (OURS, PEER)
        )
        rows.append(
            {"model": f"{OURS} / {PEER}", "way": "best of each", "dtype": dtype, "ratio": round(ours / peer, 2)}
        )
    for row in rows:
        print(row)
    write_results(
        "cpu_formats",
        rows,
        note=f"One picture of 224 px, median and fastest of {arguments.rounds} interleaved rounds. "
        "The ratio is of the smallest medians.",
    )


if __name__ == "__main__":
    main()
