"""A run that is killed in the middle of an epoch and continued is the run that was never killed."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from mambavision.cli import main
from mambavision.engine.checkpoint import load_run
from mambavision.engine.logs import EPOCHS, STEPS, read_table
from mambavision.weights import read_checkpoint
from training_data import TINY, make_npz

# 48 pictures, 6 steps an epoch, 18 in all; everything that draws random numbers is on.
RUN = [
    "train",
    *TINY,
    '--model.overrides={"img_size": 32, "drop_path_rate": 0.2}',
    "--epochs=3",
    "--batch-size=4",
    "--accumulate=2",
    "--augment.crop=pad",
    "--augment.auto_augment=rand-m9-mstd0.5-inc1",
    "--augment.erasing=0.5",
    "--augment.mixup=0.4",
    "--augment.cutmix=1",
    "--optim.warmup_epochs=1",
    "--optim.clip_grad=1",
    "--optim.ema=0.9",
    "--runtime.log_every=1",
    "--runtime.checkpoint_every=5",
]
KILLED_AT = 16
KILLED = f"""
import os, signal, sys
from mambavision.cli import main
from mambavision.engine.step import TrainingStep

run = TrainingStep.run
def run_or_die(self, step, batches):
    if step == {KILLED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
    run(self, step, batches)

TrainingStep.run = run_or_die
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of the same run, uninterrupted, and killed and continued."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order are other sums
    folder = tmp_path_factory.mktemp("runs")
    data = f"--data={make_npz(folder / 'data')}"
    assert main([*RUN, data, f"--output={folder / 'whole'}"]) == 0
    broken = [*RUN, data, f"--output={folder / 'broken'}"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *broken, "--workers=2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    state = load_run(folder / "broken" / "last.pt")
    assert (state["epoch"], state["step_in_epoch"]) == (2, 3)
    assert len(read_table(folder / "broken" / STEPS)) == KILLED_AT  # one step more than the checkpoint has
    assert main([*broken, "--resume=auto"]) == 0
    yield folder / "whole", folder / "broken"
    torch.set_num_threads(threads)


def test_every_step_has_the_same_loss_to_the_last_bit(runs):
    whole, broken = runs
    assert len(read_table(whole / STEPS)) == 18
    assert (whole / STEPS).read_text() == (broken / STEPS).read_text()


def test_every_evaluation_is_the_same(runs):
    tables = [read_table(folder / EPOCHS) for folder in runs]
    for row in (row for table in tables for row in table):
        del row["seconds"], row["images_per_second"]
    assert len(tables[0]) == 3
    assert tables[0] == tables[1]


@pytest.mark.parametrize("name", ["best.safetensors", "final.safetensors"])
def test_the_weights_are_the_same(runs, name):
    whole, broken = (read_checkpoint(folder / name) for folder in runs)
    assert whole.metrics == broken.metrics
    assert whole.state_dict.keys() == broken.state_dict.keys()
    assert all(torch.equal(tensor, broken.state_dict[key]) for key, tensor in whole.state_dict.items())


def test_a_checkpoint_is_plain_and_complete(runs):
    state = load_run(runs[0] / "last.pt")  # with weights_only=True
    assert state["step"] == 18
    assert state["config"]["optim"]["ema"] == 0.9
    assert state["ema"].keys() == state["model"].keys()
    assert not any(path.name.startswith(".") for path in runs[0].iterdir())  # no temporary file stays


def test_a_continued_run_wants_no_weights_to_begin_with(tmp_path, capsys, monkeypatch):
    data = make_npz(tmp_path / "data", train=8, val=4)
    command = ["train", "--model=mamba_vision_nano_32", "--pretrained", "--workers=0", "--device=cpu", "--batch-size=4"]
    command += [f"--data={data}", f"--output={tmp_path / 'run'}"]
    assert main([*command, "--epochs=1"]) == 0
    assert "head for 10 classes is dropped" in capsys.readouterr().err
    monkeypatch.setattr("mambavision.factory.fetch_weights", None)  # gone since
    assert main([*command, "--epochs=2", "--resume=auto"]) == 0
    assert "is dropped" not in capsys.readouterr().err


def test_a_continued_run_keeps_its_steps(tmp_path, capsys):
    """Which tell the epochs and the learning rate; a smaller batch with more of them to a step is the same run."""
    data = make_npz(tmp_path / "data", train=16, val=4)
    command = ["train", "--model=mamba_vision_nano_32", "--workers=0", "--device=cpu", f"--data={data}"]
    command += [f"--output={tmp_path / 'run'}"]
    assert main([*command, "--batch-size=8", "--epochs=1"]) == 0
    assert main([*command, "--batch-size=4", "--epochs=2", "--resume=auto"]) == 2
    assert "has 2 steps an epoch, and this one 4: keep its data, and batch_size times" in capsys.readouterr().err
    assert main([*command, "--batch-size=4", "--accumulate=2", "--epochs=2", "--resume=auto"]) == 0


def test_a_refused_run_leaves_no_folder(tmp_path):
    data = make_npz(tmp_path / "data", train=8, val=4)
    command = ["train", "--model=mamba_vision_nano_32", "--device=cpu", f"--data={data}", "--model.overrides.foo=48"]
    assert main([*command, f"--output={tmp_path / 'run'}"]) == 2
    assert not (tmp_path / "run").exists()


def test_another_seed_is_another_run(runs, tmp_path):
    whole, _ = runs
    again = [*RUN, f"--data={whole.parent / 'data'}", f"--output={tmp_path}", "--seed=1", "--epochs=2"]
    assert main(again) == 0
    assert (tmp_path / STEPS).read_text().splitlines()[1] != (whole / STEPS).read_text().splitlines()[1]
