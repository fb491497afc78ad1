"""What the page must compute, as Pillow and PyTorch do: `expected.json`, which the page's tests compare with.

python web/test/make_expected.py
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms import Compose

from mambavision import Predictor
from mambavision.inference.images import read_image
from mambavision.inference.picture_files import sample_pictures
from mambavision.inference.preprocess import build_transform

EXPECTED = Path(__file__).with_name("expected.json")
# Width and height of a picture, and of what it is resized to: smaller, larger, odd, one side as it is.
SIZES = (((97, 61), (32, 32)), ((10, 7), (32, 45)), ((64, 200), (64, 32)), ((200, 33), (32, 33)), ((1, 5), (3, 2)))


def pixels(width: int, height: int) -> np.ndarray:
    """Noise and edges from a formula that the tests know too, (height, width, 3)."""
    place = np.arange(width * height * 3, dtype=np.int64)
    noise = (place * 7919 % 65521) * 31 % 256
    return np.where(place // 30 % 3 == 0, place % 2 * 255, noise).astype(np.uint8).reshape(height, width, 3)


def expected() -> dict[str, Any]:
    """Pillow's resized pixels, and what the packaged model says of the sample photographs."""
    resized = []
    for (width, height), size in SIZES:
        image = Image.fromarray(pixels(width, height)).resize(size, Image.Resampling.BICUBIC)
        data = base64.b64encode(image.tobytes()).decode()
        resized.append({"width": width, "height": height, "size": list(size), "rgb": data})
    predictor = Predictor(device="cpu")
    steps = build_transform(predictor.config.preprocessing).transforms[:-2]
    samples = {}
    paths = sample_pictures()
    for path, prediction in zip(paths, predictor(paths, top_k=len(predictor.labels)), strict=True):
        seen = Compose(steps)(read_image(path))
        values = zip(prediction.labels, prediction.probabilities, strict=True)
        samples[path.name] = {
            "probabilities": {label: round(value, 4) for label, value in values},
            "rgb": base64.b64encode(seen.tobytes()).decode(),
        }
    return {"resized": resized, "samples": samples}


if __name__ == "__main__":
    EXPECTED.write_text(json.dumps(expected(), indent=1) + "\n")
