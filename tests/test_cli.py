"""The command line as a user meets it: what goes to stdout, what to stderr, and the exit code."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from mambavision import __version__, create_model
from mambavision.cli import COMMANDS, main
from mambavision.config import VARIANTS
from mambavision.inference.picture_files import SAMPLES, sample_pictures
from mambavision.weights import WEIGHTS, save_checkpoint

CAT = str(SAMPLES / "cat.jpg")
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    network = create_model("mamba_vision_test_tiny", class_names=CIFAR)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_checkpoint(path, network.state_dict(), network.config)
    return str(path)


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def python(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


# ---- mambavision -----------------------------------------------------------------------------------------------------


def test_help_lists_every_command_with_its_summary(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert all(len(line) <= 90 and len(line.split()) > 4 for line in lines)


def test_help_is_fast_for_it_imports_nothing_heavy():
    script = (
        "import sys; from mambavision.cli import main; main(['--help']); main(['nonsense']);"
        "print([name for name in ('torch', 'rich', 'PIL', 'timm', 'jsonargparse') if name in sys.modules])"
    )
    began = time.perf_counter()
    out, _ = python("-c", script).communicate()
    assert out.decode().splitlines()[-1] == "[]"
    assert time.perf_counter() - began < 3  # a tenth of this on an idle machine


def test_without_a_command_the_help_goes_to_stderr(capsys):
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert "classify" in err


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"mambavision {__version__}\n")


@pytest.mark.parametrize(("typed", "meant"), [("clasify", "classify"), ("model", "models"), ("evalute", "evaluate")])
def test_a_mistyped_command_gets_the_nearest_name(capsys, typed, meant):
    code, _, err = run(capsys, typed)
    assert code == 2
    assert err == f"mambavision: unknown command {typed!r}; did you mean {meant!r}?\n"


def test_python_dash_m_is_the_same():
    process = python("-m", "mambavision", "clasify")
    _, err = process.communicate()
    assert process.returncode == 2
    assert b"did you mean 'classify'" in err


def test_unexpected_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("mambavision.cli.models.main", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["models"])


def test_interruption_is_quiet(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("mambavision.cli.models.main", interrupted)
    assert run(capsys, "models") == (130, "", "")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("command", "install"), [("evaluate", '-e "[.][[]train[]]" in the clone'), ("models", "torchmetrics")]
)
def test_a_package_that_is_missing_is_one_sentence(command, install, capsys, monkeypatch):
    def without(*_):
        raise ModuleNotFoundError("No module named 'torchmetrics.x'", name="torchmetrics.x")

    monkeypatch.setattr(f"mambavision.cli.{command}.main", without)
    code, _, err = run(capsys, command)
    assert code == 2
    assert re.fullmatch(
        f"mambavision: {command} needs torchmetrics, which is not installed: pip install {install}.", err.strip()
    )


def test_control_c_ends_without_a_traceback(checkpoint):
    process = python("-m", "mambavision", "classify", "-", "--checkpoint", checkpoint)
    assert b"Model:" in process.stderr.readline()  # it waits for standard input now
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_closed_pipe_ends_quietly(checkpoint):
    process = python("-m", "mambavision", "classify", "--samples", "--checkpoint", checkpoint, "--format", "csv")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 141
    assert err.startswith(b"Model:")
    assert err.count(b"\n") == 1


# ---- classify --------------------------------------------------------------------------------------------------------


def test_classify_samples_as_a_table(capsys, checkpoint):
    code, out, err = run(capsys, "classify", "--samples", "--checkpoint", checkpoint, "--top-k", 2)
    assert code == 0
    assert err == f"Model: {checkpoint}, 10 classes, on cpu.\n"
    rows = [line for line in out.splitlines() if "%" in line]
    assert len(rows) == 2 * len(sample_pictures())
    assert rows[0].split()[0] == "airplane.jpg"
    assert all(line.isprintable() and len(line) <= 80 for line in out.splitlines())


def test_classify_as_json(capsys, checkpoint, tmp_path):
    (tmp_path / "empty.png").touch()
    code, out, err = run(
        capsys, "classify", CAT, tmp_path / "empty.png", "--checkpoint", checkpoint, "--format", "json"
    )
    assert code == 1
    good, bad = json.loads(out)
    assert good["source"] == CAT
    assert [set(entry) for entry in good["classes"]] == [{"label", "index", "probability"}] * 5
    assert all(CIFAR[entry["index"]] == entry["label"] for entry in good["classes"])
    assert bad == {"source": str(tmp_path / "empty.png"), "error": f"{tmp_path / 'empty.png'} is empty."}
    assert bad["error"] in err


def test_classify_as_csv(capsys, checkpoint, tmp_path):
    missing = tmp_path / "missing, really.jpg"
    code, out, _ = run(capsys, "classify", CAT, missing, "--checkpoint", checkpoint, "--format", "csv", "--top-k", 10)
    assert code == 1
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["rank"] for row in rows] == [*map(str, range(1, 11)), ""]
    assert sum(float(row["probability"]) for row in rows[:10]) == pytest.approx(1, abs=1e-4)
    assert (rows[-1]["source"], rows[-1]["error"]) == (str(missing), f"{missing} does not exist.")


def test_standard_input_is_a_picture(capsys, checkpoint, monkeypatch):
    with open(CAT, "rb") as file:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(file.read())))
    code, out, _ = run(capsys, "classify", "-", CAT, "--checkpoint", checkpoint, "--format", "json")
    piped, named = json.loads(out)
    assert code == 0
    assert piped["source"] == "standard input"
    assert [entry["label"] for entry in piped["classes"]] == [entry["label"] for entry in named["classes"]]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    code, _, err = run(capsys, "classify", "-", "--checkpoint", checkpoint)
    assert code == 1
    assert "standard input is empty." in err


@pytest.mark.parametrize("command", ["explain", "embed", "train", "export"])
def test_a_file_where_a_folder_is_needed_is_one_sentence(command, capsys, checkpoint, tmp_path):
    taken = tmp_path / "taken"
    taken.write_bytes(b"")
    arguments = {
        "explain": [CAT, "--checkpoint", checkpoint, "--output", taken / "a.png"],
        "embed": [CAT, "--checkpoint", checkpoint, "--output", taken / "a.npz"],
        "train": ["--data", tmp_path, "--model", "mamba_vision_test_tiny", "--output", taken],
        "export": ["mamba_vision_nano_32", "--output", taken / "a.onnx"],
    }
    code, _, err = run(capsys, command, *arguments[command])
    assert code == 2
    assert err.splitlines()[-1] == (
        f"mambavision: {taken} is a file, and a folder is needed there; choose another place for the output."
    )


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a folder where nobody may write")
@pytest.mark.parametrize("command", ["explain", "export"])
def test_a_folder_that_takes_no_files_is_told_by_the_file_asked_for(command, capsys, checkpoint):
    arguments = {
        "explain": [CAT, "--checkpoint", checkpoint, "--output", "/proc/a.png"],
        "export": ["mamba_vision_nano_32", "--output", "/proc/a.onnx"],
    }
    code, _, err = run(capsys, command, *arguments[command])
    assert code == 2
    assert err.splitlines()[-1].startswith(f"mambavision: {arguments[command][-1]}: ")


def test_everything_that_can_be_wrong_with_the_input_at_once(capsys, checkpoint, tmp_path):
    """Each is named in one sentence on stderr, the good pictures are still classified, and the exit code is 1."""
    folder = tmp_path / "pictures"
    (folder / "none").mkdir(parents=True)
    data = (SAMPLES / "cat.jpg").read_bytes()
    contents = {"empty.jpg": b"", "text.png": b"no picture", "cut.jpg": data[:9000], "[red]good.jpg": data}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    bad = [folder / "none", folder / "*.tiff", "http://example.org/a.jpg", folder / "missing.jpg"]
    code, out, err = run(capsys, "classify", folder, *bad, "--checkpoint", checkpoint, "--format", "csv", "--top-k", 1)
    assert code == 1
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["source"] for row in rows if not row["error"]] == [str(folder / "[red]good.jpg")]
    sentences = err.splitlines()
    assert len(sentences) == 1 + 3 + 4  # the model, the files, the arguments
    for name in ("empty.jpg", "text.png", "cut.jpg", "none", "*.tiff", "example.org", "missing.jpg"):
        assert sum(name in sentence for sentence in sentences) == 1, name
    assert "[red]good.jpg" in run(capsys, "classify", folder, "--checkpoint", checkpoint)[1]


def test_nothing_given_is_wrong_use_and_nothing_found_is_a_failure(capsys, tmp_path):
    code, out, err = run(capsys, "classify")
    assert (code, out) == (2, "")
    assert "--samples" in err
    code, out, err = run(capsys, "classify", tmp_path)
    assert (code, out) == (1, "")
    assert err == f"{tmp_path} is a folder without pictures.\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model", "mamba_vision_TT"], "Unknown model 'mamba_vision_TT'; the nearest names are mamba_vision_T"),
        (["--checkpoint", "missing.safetensors"], "missing.safetensors"),
        (["--checkpoint", CAT], "cat.jpg"),
        (["--device", "abacus"], "abacus"),
        (["--top-k", "0"], "must be at least 1"),
        (["--batch-size", "many"], "invalid integer value: 'many'"),
        (["--format", "xml"], "xml"),
    ],
)
def test_wrong_use_of_classify(capsys, arguments, reason):
    code, out, err = run(capsys, "classify", CAT, *arguments)
    assert (code, out) == (2, "")
    assert reason in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_public_file_without_the_variants_name_is_wrong_use(capsys, tmp_path):
    path = tmp_path / "public.pth.tar"
    torch.save({"state_dict": create_model("mamba_vision_test_tiny").state_dict()}, path)
    code, _, err = run(capsys, "classify", CAT, "--checkpoint", path)
    assert code == 2
    assert f"{path} does not say which network it is of: name the model, too" in err
    assert run(capsys, "classify", CAT, "--checkpoint", path, "--model", "mamba_vision_test_tiny")[0] == 0


def test_many_pictures_in_small_batches(capsys, checkpoint):
    paths = [CAT] * 7
    code, out, err = run(capsys, "classify", *paths, "--checkpoint", checkpoint, "--batch-size", 2, "--format", "json")
    assert code == 0
    assert len(json.loads(out)) == 7
    assert err.count("\n") == 1  # no progress bar where stderr is no terminal


def test_the_packaged_model_says_what_it_is(capsys):
    code, out, err = run(capsys, "classify", "--samples", "--top-k", 1)
    assert code == 0
    assert f"top-1 accuracy {WEIGHTS['mamba_vision_nano_32'].top1:.4g} %" in err
    assert all(name in err for name in ("mamba_vision_nano_32", "CIFAR-10", "airplane", "truck"))
    assert len([line for line in out.splitlines() if "%" in line]) == len(sample_pictures())


# ---- models and info -------------------------------------------------------------------------------------------------


def test_models_lists_every_variant_with_weights(capsys):
    code, out, _ = run(capsys, "models", "--format", "json")
    assert code == 0
    rows = {row["model"]: row for row in json.loads(out)}
    assert set(rows) == set(WEIGHTS) == set(VARIANTS) - {"mamba_vision_test_tiny"}
    tiny = rows["mamba_vision_T"]
    assert (tiny["parameters"], tiny["top1"], tiny["license"]) == (31_794_248, 82.3, "CC-BY-NC-SA-4.0")
    assert tiny["macs"] / 1e9 == pytest.approx(4.57, abs=0.01)
    assert tiny["img_size"] == [224, 224]


def test_models_as_a_table_of_80_columns(capsys, monkeypatch):
    widest = ("mamba_vision_L2_512_21k", "mamba_vision_nano_32")
    monkeypatch.setattr("mambavision.weights.WEIGHTS", {name: WEIGHTS[name] for name in widest})
    code, out, _ = run(capsys, "models")
    assert code == 0
    assert "…" not in out
    assert all(len(line) <= 80 for line in out.splitlines())
    row = next(line for line in out.splitlines() if line.startswith("mamba_vision_L2_512_21k"))
    assert row.split() == ["mamba_vision_L2_512_21k", "241.6", "206", "512", "87.3", "98.4", "CC-BY-NC-SA-4.0"]


def test_info_shows_blocks_and_their_total(capsys):
    code, out, _ = run(capsys, "info", "mamba_vision_L3_512_21k")
    assert code == 0
    assert "…" not in out
    assert all(len(line) <= 80 for line in out.splitlines())
    lines = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert "739,570,472" in lines["total"]
    assert sum(line.startswith("levels.2.blocks.") for line in lines) == 20
    assert lines["levels.3.blocks.9"].split()[1:4] == ["TokenBlock,", "attention", "1x256x2048"]


def test_info_layer_by_layer_at_another_size(capsys):
    arguments = ("info", "mamba_vision_test_tiny", "--format", "json")
    blocks = json.loads(run(capsys, *arguments)[1])
    layers = json.loads(run(capsys, *arguments, "--layers", "--img-size", "64x128")[1])
    assert layers["img_size"] == [64, 128]
    assert layers["parameters"] == blocks["parameters"] == sum(layer["parameters"] for layer in layers["layers"])
    assert layers["macs"] == sum(layer["macs"] for layer in layers["layers"]) > 1.9 * blocks["macs"]
    assert "levels.2.blocks.0.mixer.x_proj" in {layer["name"] for layer in layers["layers"]}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["mamba_vision_TT"], "nearest names"),
        ([], "MODEL"),
        (["mamba_vision_T", "--img-size", "2x2x2"], "HEIGHTxWIDTH"),
    ],
)
def test_wrong_use_of_info(capsys, arguments, reason):
    code, out, err = run(capsys, "info", *arguments)
    assert (code, out) == (2, "")
    assert reason in err.splitlines()[-1]
