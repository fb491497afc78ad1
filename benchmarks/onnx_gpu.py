"""ONNX files in onnxruntime on a GPU: error, accuracy and speed, beside PyTorch with `optimize`.

    python benchmarks/onnx_gpu.py data/cifar10

The folder has val.npz, as get_cifar10.py writes it. The packaged model is judged on it; T has random weights, which do
not change its speed. Files are written side by side, each in a process of its own, and timed one after the other. Needs
onnxruntime-gpu in place of onnxruntime; without it nothing is measured or written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apart import json_of
from mambavision import create_model
from mambavision.export.check import ExportError, Run
from mambavision.export.graph import normalization
from mambavision.export.onnx import check_provider, export_onnx, open_file
from mambavision.export.pictures import in_batches
from mambavision.inference import optimize
from results_file import print_rows, write_results

PACKAGED = "mamba_vision_nano_32"
FILES = [(name, dtype) for name in (PACKAGED, "mamba_vision_T") for dtype in ("float32", "float16")]
BATCHES = (1, 128)
CALLS = 30


def written(name: str, dtype: str, path: Path) -> dict[str, Any]:
    """The file's row as far as its export tells it."""
    torch.manual_seed(0)
    model = create_model(name, pretrained=name == PACKAGED).eval()
    report = export_onnx(model, path, dtype=dtype, device="cuda")
    return {"model": f"`{name}`", "way": "onnxruntime", "dtype": dtype, "error": report.error}


def optimized(name: str, dtype: str) -> Run:
    """The network in PyTorch, called as a file is."""
    fast = optimize(create_model(name, pretrained=name == PACKAGED, device="cuda"), dtype=getattr(torch, dtype))

    @torch.inference_mode()
    def run(pictures: Tensor) -> list[Tensor]:
        return [fast(pictures.cuda()).cpu()]

    return run


def top1(run: Run, file: Path) -> float:
    """Accuracy of the packaged model in percent."""
    with np.load(file) as content:
        images, labels = content["images"], torch.from_numpy(content["labels"].astype(np.int64))
    normalize = normalization(create_model(PACKAGED))
    pictures = normalize(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() / 255)
    found = torch.cat([run(batch)[0].argmax(1) for batch in in_batches(pictures, BATCHES[-1])])[: len(labels)]
    return round(100 * (found == labels).float().mean().item(), 2)


def milliseconds(run: Run, pictures: Tensor) -> float:
    """Median of a call, from pictures in the host's memory to logits there."""
    times = []
    for number in range(CALLS + 5):
        start = time.perf_counter()
        run(pictures)
        if number >= 5:  # warm-up
            times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times), 2)


def main() -> None:
    """Export, measure and write; or, asked by itself, export one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with val.npz")
    parser.add_argument("--only", nargs=3, metavar=("MODEL", "TYPE", "FILE"), help="what the script asks itself for")
    arguments = parser.parse_args()
    if arguments.only:
        name, dtype, path = arguments.only
        print(json.dumps(written(name, dtype, Path(path))))
        return
    try:
        check_provider("cuda")
    except ExportError as error:  # no failure: make bench-gpu goes on with what it can measure
        print(f"Nothing measured. {error}")
        return
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        paths = [Path(folder) / f"{name}.{dtype}.onnx" for name, dtype in FILES]
        asked = [["--only", *file, path] for file, path in zip(FILES, paths, strict=True)]
        rows = list(pool.map(lambda only: json_of(__file__, arguments.data, *only), asked))
        runs = [open_file(path, "cuda") for path in paths]
    rows += [{"model": f"`{name}`", "way": "PyTorch, optimize", "dtype": dtype} for name, dtype in FILES]
    runs += [optimized(name, dtype) for name, dtype in FILES]
    for (name, _), run, row in zip(FILES * 2, runs, rows, strict=True):
        row["top1"] = top1(run, arguments.data / "val.npz") if name == PACKAGED else None
        side = create_model(name, device="meta").config.preprocessing.img_size
        for batch in BATCHES:
            row[f"milliseconds_{batch}"] = milliseconds(run, torch.randn(batch, 3, *side))
        print(row, flush=True)

    rows.sort(key=lambda row: row["model"])
    print_rows(rows)
    write_results(
        "onnx_gpu",
        rows,
        note=f"A call takes pictures from the host's memory and brings logits back; median of {CALLS}. TensorFloat-32 "
        "is off in the files. T has random weights. Error: largest difference to PyTorch on the CPU on the sample "
        "photographs, relative to the largest logit.",
    )


if __name__ == "__main__":
    main()
