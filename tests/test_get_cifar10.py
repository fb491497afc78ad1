"""The script that fetches CIFAR-10, on an archive of the published layout made here."""

import importlib.util
import pickle
import sys
from pathlib import Path

import numpy as np

from mambavision.data.folder import open_training

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "get_cifar10.py"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_the_archive_becomes_what_training_reads(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("get_cifar10", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "get_cifar10", script)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script.CIFAR10, "_check_integrity", lambda _: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)

    content = tmp_path / "archive" / "cifar-10-batches-py"
    content.mkdir(parents=True)
    rng = np.random.default_rng(0)
    planes = {}
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        planes[name] = rng.integers(0, 256, (2, 3072), dtype=np.uint8)  # a row: 1024 red, then green, then blue
        (content / name).write_bytes(pickle.dumps({"data": planes[name], "labels": [3, 9]}))
    (content / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}))

    script.convert(tmp_path / "archive", tmp_path, download=False)
    training, evaluation = open_training(tmp_path)
    assert (len(training), len(evaluation)) == (10, 2)
    assert training.class_names == tuple(CLASSES)
    assert training.labels.tolist() == [3, 9] * 5
    expected = planes["test_batch"][1].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(evaluation.read(1)), expected)
