"""What products in 8 bits do to the results: the packaged model on CIFAR-10, and the large networks' logits.

    python benchmarks/float8_error.py data/cifar10/val.npz

Computes what `optimize(model, dtype=torch.float8_e4m3fn)` does on a GPU by the references of its operations, and so
runs anywhere; no time is measured. All tokens go through 8 bits, also those too few to gain by it. The file is the one
that `benchmarks/get_cifar10.py` writes. The large networks have random weights, with a layer scale of 1, else their
token blocks would hardly count; and they see random pictures, which no class explains.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambavision import create_model
from mambavision.inference import gpu
from mambavision.inference.fuse import fuse
from mambavision.inference.optimization import finished
from results_file import print_rows, write_results

BATCH = 250
LARGE, PICTURES = ("mamba_vision_L", "mamba_vision_L2"), 4


def main() -> None:
    """Compute, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    with np.load(parser.parse_args().pictures) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    model = create_model("mamba_vision_nano_32", pretrained=True).eval()
    mean, std = (
        torch.tensor(values).reshape(-1, 1, 1)
        for values in (model.config.preprocessing.mean, model.config.preprocessing.std)
    )
    batches = [batch.permute(0, 3, 1, 2) / 255 for batch in images.split(BATCH)]
    rows = [*_rows("mamba_vision_nano_32", model, [(batch - mean) / std for batch in batches], labels)]
    for name in LARGE:
        torch.manual_seed(0)
        model = create_model(name).eval()
        for parameter, values in model.named_parameters():
            if "gamma" in parameter:
                values.data.fill_(1.0)
        rows += _rows(name, model, [torch.randn(PICTURES, 3, 224, 224)], None)
    print_rows(rows)
    note = f"mamba_vision_nano_32: {len(images):,} test pictures of CIFAR-10; the others: random weights, layer scale "
    note += f"1, {PICTURES} random pictures. By the references of the operations."
    write_results("float8_error", rows, note=note)


@torch.inference_mode()
def _rows(name: str, model: Any, batches: list[torch.Tensor], labels: torch.Tensor | None) -> list[dict[str, Any]]:
    """The network as it is, and with its products in 16 and in 8 bits."""
    gpu.FLOAT8_ROWS = 0
    rows, truth = [], torch.empty(0)
    for way in ("float32", "bfloat16", "float8_e4m3fn"):
        network = model
        if way != "float32":
            network = fuse(model)
            gpu.use_kernels(network, float8=way == "float8_e4m3fn")
            network = finished(network, dtype=torch.bfloat16, tune=False)
        logits = torch.cat([network(batch) for batch in batches])
        if way == "float32":
            truth = logits
        right = None if labels is None else (logits.argmax(1) == labels).float().mean().item()
        rows.append(
            {
                "model": name,
                "dtype": way,
                "top1": None if right is None else round(100 * right, 2),
                "logit_error": round(((logits - truth).norm() / truth.norm()).item(), 6),
            }
        )
    return rows


if __name__ == "__main__":
    main()
