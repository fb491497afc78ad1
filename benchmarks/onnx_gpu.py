"""ONNX files in onnxruntime on a GPU: error, accuracy and speed, beside PyTorch.

    python benchmarks/onnx_gpu.py data/cifar10

The folder has val.npz, as get_cifar10.py writes it. The packaged model is judged on it; T has random weights, which
do not change its speed. Needs onnxruntime-gpu in place of onnxruntime.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mambavision import create_model
from mambavision.export.graph import normalization
from mambavision.export.onnx import export_onnx, open_file
from mambavision.export.pictures import in_batches
from results_file import write_results

MODELS = {"mamba_vision_nano_32": True, "mamba_vision_T": False}  # by name, whether weights are packaged
DTYPES = ("float32", "float16")
BATCHES = (1, 128)
CALLS = 30


def milliseconds(run: Callable[[Tensor], Any], pictures: Tensor) -> float:
    """Median of a call, from pictures in the host's memory to logits there."""
    times = []
    for number in range(CALLS + 5):
        start = time.perf_counter()
        run(pictures)
        if number >= 5:  # warm-up
            times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times), 2)


def in_pytorch(model: torch.nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The same call in eager PyTorch."""
    model = model.to(dtype)

    @torch.inference_mode()
    def run(pictures: Tensor) -> Tensor:
        return model(pictures.cuda().to(dtype)).float().cpu()

    return run


def top1(run: Callable[[Tensor], Any], model: Any, file: Path) -> float:
    """Accuracy in percent."""
    with np.load(file) as content:
        images, labels = content["images"], torch.from_numpy(content["labels"].astype(np.int64))
    pictures = normalization(model)(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() / 255)
    found = torch.cat([run(batch)[0].argmax(1) for batch in in_batches(pictures, BATCHES[-1])])[: len(labels)]
    return round(100 * (found == labels).float().mean().item(), 2)


def main() -> None:
    """Export, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with val.npz")
    data = parser.parse_args().data
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # as onnxruntime here
    rows: list[dict[str, Any]] = []
    for name, packaged in MODELS.items():
        for dtype in DTYPES:
            model = create_model(name, pretrained=packaged).eval()
            with tempfile.TemporaryDirectory() as folder:
                report = export_onnx(model, Path(folder) / f"{name}.onnx", dtype=dtype, device="cuda")
                run = open_file(report.path, "cuda")
            row: dict[str, Any] = {"model": f"`{name}`", "dtype": dtype, "error": report.error}
            row["top1"] = top1(run, model, data / "val.npz") if packaged else None
            torch_run = in_pytorch(model.cuda(), getattr(torch, dtype))
            for batch in BATCHES:
                pictures = torch.randn(batch, 3, *model.config.preprocessing.img_size)
                row[f"onnxruntime_{batch}"] = milliseconds(run, pictures)
                row[f"pytorch_{batch}"] = milliseconds(torch_run, pictures)
            rows.append(row)
            print(row, flush=True)

    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    write_results(
        "onnx_gpu",
        rows,
        note=f"A call takes pictures from the host's memory and brings logits back; median of {CALLS}. TensorFloat-32 "
        "is off. T has random weights. PyTorch is eager. Error: largest difference to PyTorch on the CPU on the sample "
        "photographs, relative to the largest logit.",
    )


if __name__ == "__main__":
    main()
