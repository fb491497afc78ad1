import json
import os

import pytest
import yaml
from PIL import Image
from rich.console import Console

from mambavision import create_model
from mambavision.cli import main
from mambavision.cli.train import parse
from mambavision.engine.checkpoint import load_run
from mambavision.engine.logs import EPOCHS, STEPS, read_table
from mambavision.weights import read_checkpoint
from training_data import CLASSES, TINY, make_bad, make_folder, make_npz, pictures

QUICK = ["train", *TINY, "--epochs=1", "--batch-size=8", "--augment.crop=pad"]


def test_training_learns_and_leaves_everything_behind(tmp_path, capsys):
    out = tmp_path / "run"
    command = [*QUICK, f"--data={make_npz(tmp_path / 'data', train=96)}", f"--output={out}", "--epochs=4", "--lr=3e-3"]
    assert main(command) == 0
    epochs = read_table(out / EPOCHS)
    assert epochs[-1]["val_top1"] > 60  # of three classes that differ in brightness
    assert [row["epoch"] for row in epochs] == [0, 1, 2, 3]
    assert len(read_table(out / STEPS)) == 4 * 12
    with Image.open(out / "curves.png") as curves:
        assert min(curves.size) > 300
    assert list((out / "tensorboard").glob("events*"))
    checkpoint = read_checkpoint(out / "best.safetensors")
    assert checkpoint.config.class_names == CLASSES
    assert checkpoint.metrics["top1"] == max(row["val_top1"] for row in epochs)
    assert read_checkpoint(out / "final.safetensors").metrics["top1"] == epochs[-1]["val_top1"]
    assert checkpoint.extra["training"]["optim"]["lr"] == 3e-3
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("epoch ") for line in lines) == 4  # off a terminal, one line an epoch
    assert any("best.safetensors" in line for line in lines)


def test_a_fine_tuned_model_classifies_pictures_by_the_folders_names(tmp_path, capsys):
    start = tmp_path / "start"
    assert main([*QUICK, f"--data={make_npz(tmp_path / 'data')}", f"--output={start}"]) == 0
    two = make_folder(tmp_path / "pictures", 24)
    for file in (two / "cow").iterdir():
        file.unlink()
    (two / "cow").rmdir()
    out = tmp_path / "tuned"
    tuned = [f"--data={two}", "--val-split=0.25", f"--checkpoint={start / 'best.safetensors'}", f"--output={out}"]
    assert main([*QUICK, *tuned, "--batch-size=4", "--data.cache=true"]) == 0
    capsys.readouterr()
    picture = str(two / "ant" / "00000.png")
    assert main(["classify", picture, f"--checkpoint={out / 'best.safetensors'}", "--format=json"]) == 0
    (prediction,) = json.loads(capsys.readouterr().out)
    assert set(CLASSES[:2]) == {entry["label"] for entry in next(v for v in prediction.values() if isinstance(v, list))}


def test_fine_tuning_starts_from_the_weights(tmp_path):
    data = f"--data={make_npz(tmp_path / 'data')}"
    start = tmp_path / "start"
    assert main([*QUICK, data, f"--output={start}", "--lr=3e-3", "--epochs=3"]) == 0
    loaded = [f"--checkpoint={start / 'final.safetensors'}", f"--output={tmp_path / 'again'}", "--lr=1e-9"]
    assert main([*QUICK, data, *loaded]) == 0
    first, again = (read_table(folder / EPOCHS)[-1] for folder in (start, tmp_path / "again"))
    assert again["val_loss"] < first["val_loss"] + 0.1  # batch statistics move on; a fresh network has 1.1


def test_a_recipe_with_flags_on_top(tmp_path):
    settings = {
        "model": {"name": "mamba_vision_test_tiny", "overrides": {"img_size": 32, "mixer_order": "attention_only"}},
        "data": {"dir": str(make_npz(tmp_path / "data")), "workers": 0},
        "optim": {"lr": 0.5, "ema": 0.5},
        "runtime": {"device": "cpu"},
        "batch_size": 8,
        "epochs": 7,
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", f"--config={tmp_path / 'recipe.yaml'}", "--epochs=1", "--lr", "1e-3"]) == 0
    config = load_run(tmp_path / "run" / "last.pt")["config"]
    assert (config["epochs"], config["optim"]["lr"], config["optim"]["ema"]) == (1, 1e-3, 0.5)
    model = create_model(None, checkpoint_path=tmp_path / "run" / "best.safetensors")
    assert model.config.mixer_order == "attention_only"


@pytest.mark.parametrize(
    ("flags", "pretrained"), [(["--pretrained"], True), (["--pretrained=false"], False), ([], False)], ids=str
)
def test_the_short_flag_for_weights_takes_a_value_too(tmp_path, flags, pretrained):
    arguments = ["--data", str(tmp_path), "--model", "mamba_vision_T", *flags]
    assert parse(arguments, Console(quiet=True))[0].model.pretrained is pretrained


def test_help_documents_every_setting(capsys):
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "rand-m9-mstd0.5-inc1" in text
    assert "decay of the moving average" in text
    assert "--data = --data.dir" in text
    assert "--data CONFIG" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.learning_rate=1"], "optim.learning_rate"),
        (["--optim.lr=fast"], "optim.lr"),
        (["--optim.lr=-1"], "lr must be positive, got -1.0"),
        (["--model=mamba_vision_X"], "nearest names"),
        (["--model.overrides={depth: 3}"], "depth"),
        (["--batch-size=500"], "48 training pictures do not fill one step of 500"),
        (["--device=cuda:77"], "cuda:77"),
        (["--augment.auto_augment=nonsense"], "'nonsense' is not a policy"),
        (["--resume=nowhere.pt"], "nowhere.pt does not exist"),
        (["--checkpoint=nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_wrong_use_is_one_sentence_and_code_2(tmp_path, capsys, arguments, message):
    data = make_npz(tmp_path / "data")
    assert main([*QUICK, f"--data={data}", f"--output={tmp_path / 'run'}", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_an_unknown_key_in_a_recipe_is_an_error(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("optim:\n  learning_rate: 1\n")
    assert main(["train", f"--config={tmp_path / 'recipe.yaml'}"]) == 2
    assert "learning_rate" in capsys.readouterr().err


def test_without_data_it_says_so(capsys):
    assert main(["train", *TINY]) == 2
    assert "--data" in capsys.readouterr().err


def test_a_run_is_not_overwritten_and_what_changes_on_resume_is_said(tmp_path, capsys):
    out = tmp_path / "run"
    command = [*QUICK, f"--data={make_npz(tmp_path / 'data')}", f"--output={out}"]
    assert main([*command, "--resume=auto"]) == 0  # nothing to continue: a fresh start
    assert main(command) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert main(["train", f"--resume={out / 'last.pt'}", "--epochs=2"]) == 0  # all else from the checkpoint
    assert "continuing with epochs = 2 (was 1)" in capsys.readouterr().out
    assert [row["epoch"] for row in read_table(out / EPOCHS)] == [0, 1]
    assert main([*command, "--epochs=2", "--resume=auto"]) == 0  # complete already
    for change in (f"--output={tmp_path / 'other'}", "--optim.name=sgd", "--model=mamba_vision_nano_32"):
        assert main(["train", f"--resume={out / 'last.pt'}", change]) == 2
        assert ("own folder" if "output" in change else "keeps its") in capsys.readouterr().err
    (out / "last.pt").write_bytes(b"cut")
    assert main([*command, "--resume=auto"]) == 2
    assert "is damaged or no checkpoint of a run" in capsys.readouterr().err


@pytest.mark.parametrize("cached", ["true", "false"])
def test_bad_pictures_are_named_and_counted(tmp_path, capsys, cached):
    make_folder(tmp_path / "data" / "train", 24)
    make_folder(tmp_path / "data" / "val", 9)
    bad = [make_bad(tmp_path / "data" / place) for place in ("train/ant/00000.png", "val/bee/00001.png")]
    out = tmp_path / "run"
    assert main([*QUICK, f"--data={tmp_path / 'data'}", f"--output={out}", f"--data.cache={cached}"]) == 0
    listed = (out / "bad_pictures.txt").read_text()
    assert all(str(path) in listed for path in bad)
    assert len(listed.splitlines()) == 2
    assert "could not be read and were passed over: 2" in " ".join(capsys.readouterr().out.split())


def test_a_name_that_is_no_text_is_a_name_like_any_other(tmp_path):
    make_folder(tmp_path / "data" / "train", 24)
    make_folder(tmp_path / "data" / "val", 9)
    folder = os.fsencode(tmp_path / "data" / "train" / "ant")
    os.rename(folder + b"/00000.png", folder + b"/b\xff.png")
    (tmp_path / "data" / "train" / "ant" / "._00003.png").write_bytes(b"hidden")
    out = tmp_path / "run"
    assert main([*QUICK, f"--data={tmp_path / 'data'}", f"--output={out}"]) == 0
    assert not (out / "bad_pictures.txt").exists()


def test_interrupting_says_how_to_continue(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mambavision.engine.step.TrainingStep.run", interrupt)
    assert main([*QUICK, f"--data={make_npz(tmp_path / 'data')}", f"--output={tmp_path / 'run'}"]) == 130
    assert "--resume auto" in capsys.readouterr().err


def test_the_synthetic_pictures_can_be_told_apart():
    images, labels = pictures(30)
    assert all(abs(image.mean() - 60 - 60 * label) < 15 for image, label in zip(images, labels, strict=True))
