"""Small labelled data sets in the layouts that training reads, and the shortest command line that trains on them."""

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cow")
# A second of training: 32 px pictures, a network of 150,000 parameters, everything in this process.
TINY = ["--model=mamba_vision_test_tiny", '--model.overrides={"img_size": 32}', "--workers=0", "--device=cpu"]


def pictures(count, seed=0, size=32):
    """Pictures whose brightness tells their class, with noise; uint8 (count, size, size, 3), labels int64 (count,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    images = 60 + 60 * labels[:, None, None, None] + rng.integers(-40, 40, (count, size, size, 3))
    return images.clip(0, 255).astype(np.uint8), labels


def make_npz(folder, train=48, val=24, names=CLASSES):
    """FOLDER/train.npz and FOLDER/val.npz."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, seed in (("train", train, 0), ("val", val, 1)):
        images, labels = pictures(count, seed)
        extra = {} if names is None else {"class_names": np.array(names)}
        np.savez(folder / f"{split}.npz", images=images, labels=labels, **extra)
    return folder


def make_folder(folder, count=24, seed=0, size=32):
    """FOLDER/CLASS/00000.png and so on."""
    for number, (image, label) in enumerate(zip(*pictures(count, seed, size), strict=True)):
        path = folder / CLASSES[label] / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def make_bad(path):
    """A file with a picture's name and no picture in it."""
    path.write_bytes(b"\x89PNG\r\n\x1a\n not really")
    return path
