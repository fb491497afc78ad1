"""Every variant as an ONNX file: operations, size, error and how long onnxruntime takes to open it.

    python benchmarks/onnx_variants.py

Random weights, which change neither the graph nor its size. Each file is checked, compared with PyTorch on the sample
photographs by `export_onnx`, opened once more for the time, and removed. L3 takes some 20 GiB of memory.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path

import torch

from mambavision import create_model
from mambavision.config import VARIANTS
from mambavision.export.onnx import export_onnx, open_file
from mambavision.weights import WEIGHTS
from results_file import write_results


def main() -> None:
    """Export, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(WEIGHTS), help="default: all")
    rows = []
    for name in parser.parse_args().models:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            report = export_onnx(create_model(name).eval(), Path(folder) / f"{name}.onnx")
            written = time.perf_counter()
            open_file(report.path)
            opened = time.perf_counter()
            beside = [path for path in Path(folder).iterdir() if path != report.path]
            rows.append(
                {
                    "model": f"`{name}`",
                    "side": VARIANTS[name].preprocessing.img_size[0],
                    "nodes": report.nodes,
                    "bytes": report.path.stat().st_size,
                    "bytes_beside": sum(path.stat().st_size for path in beside) if beside else None,
                    "error": report.error,
                    "seconds_to_write": round(written - started),
                    "seconds_to_open": round(opened - written, 1),
                    "milliseconds": round(report.milliseconds, 1),
                }
            )
        print(rows[-1], flush=True)
        gc.collect()
    write_results(
        "onnx_variants",
        rows,
        note="float32, random weights. Error: largest difference to PyTorch on the sample photographs, relative to the "
        "largest logit. Writing includes the check and the comparison; the last column is a picture in onnxruntime.",
    )


if __name__ == "__main__":
    main()
