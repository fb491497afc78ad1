import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mambavision import create_model
from mambavision.cli import main
from mambavision.cli.evaluate import distinct
from mambavision.data import DataError
from mambavision.data.folder import open_pictures
from mambavision.engine.evaluate import evaluate, match_classes
from mambavision.inference.predictor import Predictor
from mambavision.weights import save_checkpoint
from training_data import CLASSES, make_bad, make_folder, make_npz

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = create_model("mamba_vision_test_tiny", class_names=CLASSES, img_size=32, layer_scale=1.0)
    torch.nn.init.normal_(model.head.weight)
    save_checkpoint(tmp_path / "model.safetensors", model.state_dict(), model.config)
    return str(tmp_path / "model.safetensors")


def run(capsys, *arguments):
    code = main(["evaluate", "--workers=0", "--device=cpu", "--format=json", *arguments])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


def test_it_agrees_with_prediction(tmp_path, checkpoint, capsys):
    folder = make_folder(tmp_path / "val", 20, size=50)
    code, report, _ = run(capsys, f"--data={tmp_path}", f"--checkpoint={checkpoint}", "--batch-size=7", "--per-class")
    predictions = Predictor(checkpoint=checkpoint, device="cpu")(sorted(folder.rglob("*.png")), top_k=3)
    right = [prediction.labels[0] in prediction.source.split("/") for prediction in predictions]
    losses = [-np.log(dict(zip(p.labels, p.probabilities, strict=True))[p.source.split("/")[-2]]) for p in predictions]
    assert code == 0
    assert report["count"] == 20
    assert report["top1"] == pytest.approx(100 * np.mean(right), abs=1e-4)
    assert report["top5"] == 100  # of three classes
    assert report["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    for name in CLASSES:
        own = [hit for hit, prediction in zip(right, predictions, strict=True) if f"/{name}/" in prediction.source]
        assert report["per_class"][name] == pytest.approx(100 * np.mean(own), abs=1e-3)


def test_npz_and_folder_give_the_same(tmp_path, checkpoint, capsys):
    make_npz(tmp_path / "arrays", val=12)
    with np.load(tmp_path / "arrays" / "val.npz") as content:
        for number, (image, label) in enumerate(zip(content["images"], content["labels"], strict=True)):
            path = tmp_path / "files" / CLASSES[label] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    reports = [
        run(capsys, f"--data={tmp_path / kind}", f"--checkpoint={checkpoint}")[1] for kind in ("arrays", "files")
    ]
    for name in ("top1", "count"):
        assert reports[0][name] == reports[1][name]
    assert reports[0]["loss"] == pytest.approx(reports[1]["loss"], rel=1e-5)


def test_unreadable_pictures_are_named_and_left_out(tmp_path, checkpoint, capsys):
    bad = make_bad(make_folder(tmp_path / "val", 9) / "cow" / "00002.png")
    code, report, messages = run(capsys, f"--data={tmp_path}", f"--checkpoint={checkpoint}")
    assert code == 1
    assert (report["count"], report["bad"]) == (8, [str(bad)])
    assert str(bad) in messages


def test_the_table(tmp_path, checkpoint, capsys):
    make_npz(tmp_path, val=9)
    arguments = ["evaluate", f"--data={tmp_path}", f"--checkpoint={checkpoint}", "--workers=0", "--device=cpu"]
    assert main([*arguments, "--per-class"]) == 0
    text = capsys.readouterr().out
    assert "top-1" in text
    assert all(name in text for name in CLASSES)


def test_no_pictures_is_one_sentence(tmp_path, checkpoint, capsys):
    assert main(["evaluate", f"--data={tmp_path / 'none'}", f"--checkpoint={checkpoint}"]) == 2
    assert "none" in capsys.readouterr().err


def test_a_network_without_classes_is_one_sentence(tmp_path, capsys):
    model = create_model("mamba_vision_test_tiny", num_classes=0)
    save_checkpoint(tmp_path / "headless.safetensors", model.state_dict(), model.config)
    data = make_npz(tmp_path / "data")
    assert main(["evaluate", f"--data={data}", f"--checkpoint={tmp_path / 'headless.safetensors'}"]) == 2
    assert "no classifier" in capsys.readouterr().err


def test_accuracy_by_hand():
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 8), torch.randint(0, 7, (40,))  # no picture of class 7
    model = torch.nn.Identity().train()
    bad = [("x.png", "x.png is empty.")]
    nothing = torch.zeros(0), torch.zeros(0, dtype=torch.int64), bad
    batches = [(logits[:30], labels[:30], []), nothing, (logits[30:], labels[30:], [])]
    result = evaluate(model, batches, num_classes=8, device=CPU)
    ranked = logits.argsort(1, descending=True)
    hits = ranked == labels[:, None]
    assert result.top1 == pytest.approx(100 * hits[:, 0].float().mean().item(), abs=1e-3)
    assert result.top5 == pytest.approx(100 * hits[:, :5].any(1).float().mean().item(), abs=1e-3)
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    for number in range(7):
        expected = 100 * hits[labels == number, 0].float().mean().item()
        assert result.per_class[number] == pytest.approx(expected, abs=1e-3)
    assert np.isnan(result.per_class[7])
    assert (result.count, result.bad) == (40, bad)
    assert model.training  # as before


def test_a_name_of_two_classes_matches_neither_and_is_told_apart(tmp_path):
    make_folder(tmp_path / "val", 6)
    pictures = open_pictures(tmp_path / "val")
    with pytest.raises(DataError, match=f"does not know 1 .*{CLASSES[0]}"):
        match_classes(pictures, [CLASSES[0], *CLASSES])
    assert distinct(["crane", "cat", "crane"]) == ["crane (0)", "cat", "crane (2)"]


def test_classes_are_matched_by_name_then_by_order(tmp_path):
    pictures = open_pictures(make_folder(tmp_path, 6))  # ant, bee, cow
    matched, said = match_classes(pictures, ("cow", "dog", "ant", "bee"))
    assert matched.labels.tolist() == [2, 2, 3, 3, 0, 0]
    assert "by name" in said
    matched, said = match_classes(pictures, ("n1", "n2", "n3"))
    assert matched.labels.tolist() == pictures.labels.tolist()
    assert "ant as n1" in said
    for names in (("ant", "bee", "eel"), ("n1", "n2")):
        with pytest.raises(DataError, match="such as"):
            match_classes(pictures, names)
