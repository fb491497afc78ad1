"""A network in every format and type: size, error, accuracy and speed on this CPU.

    python benchmarks/formats.py data/cifar10
    python benchmarks/formats.py data/cifar10 --model mamba_vision_T

The folder is what get_cifar10.py writes. The packaged model, which is the default, is judged on its test pictures; int8
is calibrated on 256 of its training pictures and, as ONNX, on the sample photographs too, to see what that is worth.
Another network has random weights, which change neither size nor speed, and is compared on the sample photographs. All
files take turns in the timing, a few calls each, round after round. A format whose library is not installed is left out
and named; float16 of PyTorch's own formats, which is for GPUs, is left out too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambavision import create_model
from mambavision.export.check import ExportError
from mambavision.export.formats import FORMATS
from mambavision.export.graph import normalization
from mambavision.export.pictures import in_batches, photographs
from mambavision.inference import optimize
from mambavision.inference.cpu import can_pack
from results_file import print_rows, write_results

PACKAGED = "mamba_vision_nano_32"
BATCHES = (1, 32)
CALLS = 5  # in a row, a round
PAUSE = 0.2  # seconds in which the runtime before gives up waiting for work on the processor
PAGES = {"onnx": "onnx", "torch-export": "torch", "aoti": "torch", "openvino": "openvino", "executorch": "executorch"}
RUNTIMES = {"onnx": "onnxruntime", "torch-export": "torch", "aoti": "torch"}

Run = Callable[[Tensor], Any]


def read_pictures(file: Path, model: Any) -> tuple[Tensor, Tensor]:
    """Pictures, normalised, (N, 3, 32, 32), and labels."""
    with np.load(file) as content:
        images, labels = content["images"], torch.from_numpy(content["labels"].astype(np.int64))
    normalised = normalization(model)(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() / 255)
    return normalised, labels


def in_pytorch(model: Any) -> list[dict[str, Any]]:
    """Rows of the network as it is, and as `optimize` makes it."""
    runtime = f"torch {importlib.metadata.version('torch')}"
    rows = [{"format": "PyTorch", "dtype": "float32", "runs": dict.fromkeys(BATCHES, _listed(model, torch.float32))}]
    rows[0]["bytes"] = sum(parameter.nbytes for parameter in model.parameters())
    for dtype in filter(can_pack, (torch.float32, torch.bfloat16)):
        runs = dict.fromkeys(BATCHES, _listed(optimize(model, dtype=dtype), dtype))
        rows.append(
            {"format": "[optimize](speed.md#on-a-cpu)", "dtype": str(dtype).removeprefix("torch."), "runs": runs}
        )
    return [{**row, "runtime": runtime} for row in rows]


def write_files(model: Any, folder: Path, calibration: list[np.ndarray] | None) -> list[dict[str, Any]]:
    """One row a file, with a `run` for each batch size; `calibration` has training pictures, if there are any."""
    rows = []
    for name, chosen in FORMATS.items():
        for dtype in chosen.dtypes if RUNTIMES.get(name) != "torch" else ("float32",):
            ways: list[tuple[str | None, list[np.ndarray] | None]] = [(None, None)]
            if dtype == "int8":
                ways = [("sample", None)] if name == "onnx" or calibration is None else []
                ways = [*([] if calibration is None else [("training", calibration)]), *ways]
            for told, pictures in ways:
                settings = [{"batch_size": size} for size in BATCHES] if "batch_size" in chosen.settings else [{}]
                if dtype == "int8":
                    settings = [{**entry, "calibration": pictures} for entry in settings]
                files = [folder / f"{name}-{dtype}-{told}-{place}{chosen.suffix}" for place in range(len(settings))]
                try:
                    for path, keywords in zip(files, settings, strict=True):
                        if not path.exists():
                            chosen.export(model, path, dtype=dtype, **keywords)
                except ExportError as error:
                    print(error)
                    break
                beside = (path for path in folder.iterdir() if path.name.startswith(files[0].stem + "."))
                runtime = RUNTIMES.get(name, name)
                rows.append(
                    {
                        "format": f"[{name}]({PAGES[name]}.md)",
                        "dtype": f"int8, {told} pictures" if told else dtype,
                        "runtime": f"{runtime} {importlib.metadata.version(runtime)}",
                        "bytes": sum(path.stat().st_size for path in beside),
                        "runs": dict(zip(BATCHES, [chosen.open_file(path) for path in files] * 2, strict=False)),
                    }
                )
                print(rows[-1]["format"], rows[-1]["dtype"], flush=True)
    return rows


def logits_of(run: Run, pictures: Tensor) -> Tensor:
    """Logits of all pictures; the last batch is filled up."""
    found = [run(batch)[0].clone() for batch in in_batches(pictures, BATCHES[-1])]
    return torch.cat(found)[: len(pictures)]


def time_all(rows: list[dict[str, Any]], pictures: Tensor, rounds: int) -> None:
    """Median milliseconds a call at each batch size, into the rows."""
    for size in BATCHES:
        batch = pictures[:size].contiguous()
        times: list[list[float]] = [[] for _ in rows]
        for _ in range(rounds):
            for row, taken in zip(rows, times, strict=True):
                time.sleep(PAUSE)
                for number in range(CALLS + 2):
                    start = time.perf_counter()
                    row["runs"][size](batch)
                    if number >= 2:  # warm-up
                        taken.append(1e3 * (time.perf_counter() - start))
        for row, taken in zip(rows, times, strict=True):
            row[f"milliseconds_{size}"] = round(statistics.median(taken), 2)


def main() -> None:
    """Write, measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.npz and val.npz")
    parser.add_argument("--model", default=PACKAGED, help=f"default: {PACKAGED}")
    parser.add_argument("--files", type=Path, metavar="DIR", help="where files are kept and, if there, not made again")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    packaged = arguments.model == PACKAGED
    torch.manual_seed(0)
    model = create_model(arguments.model, pretrained=packaged).eval()
    labels, calibration = None, None
    if packaged:
        training = np.load(arguments.data / "train.npz")["images"]
        calibration = list(training[:: len(training) // 256][:256])
        pictures, labels = read_pictures(arguments.data / "val.npz", model)
    else:
        pictures = photographs(model)

    with tempfile.TemporaryDirectory() as folder:
        rows = in_pytorch(model) + write_files(model, arguments.files or Path(folder), calibration)
        with torch.inference_mode():
            expected = logits_of(rows[0]["runs"][BATCHES[-1]], pictures)
            for row in rows:
                found = logits_of(row["runs"][BATCHES[-1]], pictures)
                largest = ((found - expected).abs().max() / expected.abs().max()).item()
                row["error"] = None if row is rows[0] else largest
                row["agreement"] = (found.argmax(1) == expected.argmax(1)).float().mean().item()
                if labels is not None:
                    row["top1"] = round(100 * (found.argmax(1) == labels).float().mean().item(), 2)
                print(row["format"], row["dtype"], row["error"], row.get("top1"), flush=True)
            time_all(rows, pictures.repeat(1 + BATCHES[-1] // len(pictures), 1, 1, 1), arguments.rounds)
        for row in rows:
            del row["runs"]

    print_rows(rows)
    judged = f"on the {len(pictures):,} test pictures of CIFAR-10" if packaged else "on the seven sample photographs"
    write_results(
        "formats" if packaged else f"formats_{arguments.model.rpartition('_')[-1]}",
        rows,
        note=f"`{arguments.model}`{'' if packaged else ', random weights,'} {judged}. Error: a logit's largest "
        f"difference to PyTorch's, relative to the largest logit. "
        f"Times: medians of {arguments.rounds} rounds of {CALLS} calls, in turns.",
    )


def _listed(module: Any, dtype: torch.dtype) -> Run:
    return lambda pictures: [module(pictures.to(dtype)).float()]


if __name__ == "__main__":
    main()
