"""What `optimize` does to the packaged model's accuracy on a GPU: CIFAR-10's test pictures, float32 beside its types.

    python benchmarks/gpu_accuracy.py data/cifar10/val.npz

The file is the one that `benchmarks/get_cifar10.py` writes. The first row is the network as it is, without `optimize`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambavision import create_model
from mambavision.inference import optimize
from mambavision.ops.backend import Situation
from mambavision.ops.float8 import refuse_float8_kernels
from results_file import print_rows, write_results

BATCH = 500
WAYS = (
    ("instant", torch.bfloat16),
    ("instant", torch.float16),
    ("full", torch.bfloat16),
    ("instant", torch.float32),
    ("instant", torch.float8_e4m3fn),
)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    torch.backends.cudnn.allow_tf32 = False  # its convolutions would use it; products of matrices do not
    with np.load(parser.parse_args().pictures) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).cuda()
    model = create_model("mamba_vision_nano_32", pretrained=True, device="cuda").eval()
    mean, std = (
        torch.tensor(values, device="cuda").reshape(-1, 1, 1)
        for values in (model.config.preprocessing.mean, model.config.preprocessing.std)
    )

    @torch.inference_mode()
    def logits(network: Any) -> torch.Tensor:
        batches = images.cuda().permute(0, 3, 1, 2).float().div(255).sub(mean).div(std).split(BATCH)
        return torch.cat([network(batch) for batch in batches])

    truth = logits(model)
    rows = [_row("the network as it is", "float32", truth, truth, labels)]
    for mode, dtype in WAYS:
        if dtype == torch.float8_e4m3fn and (fault := refuse_float8_kernels(Situation("cuda", dtype))):
            print(f"{dtype} is left out: {fault}")
            continue
        network = optimize(model, mode=mode, dtype=dtype)
        rows.append(_row(f"optimize, {mode}", str(dtype).removeprefix("torch."), logits(network), truth, labels))
    print_rows(rows)
    note = f"mamba_vision_nano_32 on {len(images):,} test pictures of CIFAR-10, batch {BATCH}; TF32 is off."
    write_results("gpu_accuracy", rows, note=note)


def _row(way: str, dtype: str, found: torch.Tensor, truth: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    return {
        "way": way,
        "dtype": dtype,
        "top1": round(100 * (found.argmax(1) == labels).float().mean().item(), 2),
        "logit_error": round(((found - truth).norm() / truth.norm()).item(), 6),
    }


if __name__ == "__main__":
    main()
