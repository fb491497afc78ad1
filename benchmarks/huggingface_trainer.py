"""One epoch of transformers' Trainer on CIFAR-10: accuracy on the test pictures before and after.

    python benchmarks/huggingface_trainer.py data/cifar10

The folder is what get_cifar10.py writes. The network is that of the package without its weights; pictures come through
its image processor, without augmentation.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from mambavision import create_model
from mambavision.integrations.huggingface import IMAGE_PROCESSORS, MambaVisionForImageClassification
from results_file import write_results

MODEL = "mamba_vision_nano_32"


class Pictures(Dataset[dict[str, Any]]):
    """An .npz of pictures and labels as Trainer takes it."""

    def __init__(self, file: Path, processor: Any, count: int | None = None) -> None:
        with np.load(file) as content:
            self.images, self.labels = content["images"][:count], content["labels"][:count].astype(int)
        self.processor = processor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.processor(Image.fromarray(self.images[index]), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.labels[index]}


def top1(prediction: Any) -> dict[str, float]:
    """Share of right classes in percent."""
    return {"top1": 100 * float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    """Train, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.npz and val.npz")
    parser.add_argument("--pictures", type=int, help="of the training pictures, from the first (default: all)")
    arguments = parser.parse_args()
    set_seed(0)
    model = MambaVisionForImageClassification.from_network(create_model(MODEL))
    processor = IMAGE_PROCESSORS["torchvision"].from_model_config(model.config)
    training = Pictures(arguments.data / "train.npz", processor, arguments.pictures)
    test = Pictures(arguments.data / "val.npz", processor)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=250,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            bf16=torch.cuda.is_available(),
            dataloader_num_workers=2,
            report_to=[],
            save_strategy="no",
            seed=0,
        )
        trainer = Trainer(model=model, args=settings, train_dataset=training, eval_dataset=test, compute_metrics=top1)
        before = trainer.evaluate()["eval_top1"]
        trainer.train()
        after = trainer.evaluate()["eval_top1"]
    row = {"model": MODEL, "pictures": len(training), "before": before, "after": after}
    print(row)
    write_results(
        "huggingface_trainer",
        [row],
        note="Top-1 on CIFAR-10's 10,000 test pictures, from random weights, before and after one epoch of Trainer; "
        "AdamW, learning rate 1e-3 with a cosine, batch 64, no augmentation.",
    )


if __name__ == "__main__":
    main()
