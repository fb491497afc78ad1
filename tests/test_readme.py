"""What the documents tell: every Python example runs, every command would, every link leads somewhere."""

import ast
import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from rich.console import Console

from mambavision import cli, create_model
from mambavision.cli.arguments import UsageError
from mambavision.cli.train import parse as parse_training
from mambavision.export.formats import FORMATS, default_name
from mambavision.export.graph import metadata
from mambavision.inference.images import read_image
from mambavision.inference.picture_files import SAMPLES
from mambavision.inference.preprocess import build_transform
from mambavision.weights import WEIGHTS, read_checkpoint, save_checkpoint
from weight_files import hub_cache, remote_repository, use_hub_cache

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Suffix of a file that an example opens -> the format it is exported to.
FILES = {".xml": "openvino", ".aoti.pt2": "aoti", ".pt2": "torch-export", ".pte": "executorch"}
SLOW_FILES = (".aoti.pt2", ".pte")  # take a minute or more to write
MAIN = "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/mambavision classify --samples"
TESTS = 'python3 -m venv .venv && .venv/bin/pip install -e ".[dev]" && .venv/bin/python -m pytest'


def examples(language):
    """(document and line, text) of every example in a language."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text()
        for fence in FENCE.finditer(text):
            if fence[1] == language:
                place = f"{path.relative_to(ROOT)}:{text[: fence.start()].count(chr(10)) + 1}"
                slow = any(f'{suffix}"' in fence[2] for suffix in SLOW_FILES)
                found.append(pytest.param(fence[2], id=place, marks=[pytest.mark.slow] if slow else []))
    return found


def test_every_example_names_its_language():
    for path in DOCUMENTS:
        assert path.read_text().count("\n```") == 2 * len(FENCE.findall(path.read_text())), path
        assert {fence[1] for fence in FENCE.finditer(path.read_text())} <= {"bash", "python", "yaml", "bibtex", "text"}


def test_the_two_commands_come_first():
    blocks = [fence[2].strip() for fence in FENCE.finditer((ROOT / "README.md").read_text())]
    assert blocks[:2] == [MAIN, TESTS]


def test_continuous_integration_runs_the_second():
    run = (ROOT / ".ci" / "run").read_text()
    found = re.search(r"grep -m 1 -- '(.*)' README.md", run)[1]
    assert next(line for line in (ROOT / "README.md").read_text().splitlines() if found in line) == TESTS


# ---- Python ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """In place of fetching: a file of random weights for a variant."""
    folder = tmp_path_factory.mktemp("weights")

    def fetch(variant, *, model_path=None):  # noqa: ARG001  (the signature of fetch_weights)
        path = folder / f"{variant}.safetensors"
        if not path.exists():
            network = create_model(variant)
            save_checkpoint(path, network.state_dict(), network.config)
        return path

    return fetch


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The hub's cache with a public repository of random weights."""
    folder = tmp_path_factory.mktemp("hub")
    repository = remote_repository(folder / "repository", create_model("mamba_vision_T"))
    return hub_cache(folder / "cache", "nvidia/MambaVision-T-1K", repository)


def printed_values(code):
    """What comments say is printed: beside a print, or in the line below it."""
    lines = code.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("print("):
            call, _, value = line.partition("  # ")
            if not value and following.startswith("# "):
                value = following.removeprefix("# ")
            if value:
                yield value


def export_packaged(name, folder):
    """Write the packaged model in a format under the name that the command gives it."""
    if name in ("openvino", "executorch"):
        pytest.importorskip(name)
    model = create_model("mamba_vision_nano_32", pretrained=True)
    FORMATS[name].export(model, folder / default_name("mamba_vision_nano_32", name, "float32"))


@pytest.mark.parametrize("code", examples("python"))
def test_a_python_example_runs_and_prints_what_it_says(code, request, weights, tmp_path, monkeypatch, capsys):
    if "integrations.huggingface" in code:
        pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        use_hub_cache(monkeypatch, request.getfixturevalue("hub"))
    if ".onnx" in code:
        shutil.copy(request.getfixturevalue("nano_onnx")[1].path, tmp_path)
    if suffix := next((suffix for suffix in FILES if f'{suffix}"' in code), None):
        export_packaged(FILES[suffix], tmp_path)
    monkeypatch.setattr("mambavision.factory.fetch_weights", weights)
    variants = {spec.repo_id: spec.variant for spec in WEIGHTS.values()}
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf",
        lambda repo_id, *_, **__: read_checkpoint(weights(variants[repo_id])).state_dict,
    )
    monkeypatch.chdir(tmp_path)
    for picture in ("cat.jpg", "dog.jpg"):
        shutil.copy(SAMPLES / picture, tmp_path)
    exec(compile(ast.parse(code), "example", "exec"), {"__name__": "example"})
    out = capsys.readouterr().out.splitlines()
    assert [value for value in printed_values(code) if value not in out] == []


def preprocessing_examples():
    """The part of each example that prepares a picture without this package, with its imports but for the runtime's."""
    found = []
    for example in examples("python"):
        paragraphs = [text for text in example.values[0].split("\n\n") if 'about["crop_pct"]' in text]
        if paragraphs:
            (prepare,) = paragraphs
            imports = re.findall(r"^(?:import numpy|from PIL|from torchvision).*$", example.values[0], re.MULTILINE)
            found.append(pytest.param("\n".join([*imports, prepare]), id=example.id))
    return found


def test_the_pages_of_all_formats_prepare_pictures():
    pages = [example.id.partition(":")[0] for example in preprocessing_examples()]
    assert pages == ["docs/executorch.md", "docs/onnx.md", "docs/openvino.md", "docs/torch.md", "docs/torch.md"]


@pytest.mark.parametrize("code", preprocessing_examples())
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"img_size": (50, 50), "crop_pct": 0.875},
        {"img_size": (48, 80), "crop_pct": 0.9},
        {"img_size": (97, 55), "crop_mode": "squash", "crop_pct": 0.95, "interpolation": "bilinear"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(333, 251), (97, 160), (41, 37)], ids=str)
def test_examples_prepare_pictures_as_the_package_does(code, settings, size, tmp_path, monkeypatch):
    model = create_model("mamba_vision_test_tiny", device="meta")
    model.config = model.config.replace(preprocessing=dataclasses.replace(model.config.preprocessing, **settings))
    monkeypatch.chdir(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    with Image.open(SAMPLES / "cat.jpg") as cat:
        ImageOps.exif_transpose(cat).resize(size).save("cat.jpg", exif=exif)
    found = {"about": {name: json.loads(value) for name, value in metadata(model).items()}}
    exec(compile(code, "example", "exec"), found)
    expected = build_transform(model.config.preprocessing)(read_image("cat.jpg"))[None]
    np.testing.assert_allclose(np.asarray(found["pixels"]), expected, rtol=0, atol=1e-5)  # a grey level is 0.017


# ---- commands --------------------------------------------------------------------------------------------------------


def commands(block):
    """The simple commands of a block, as lists of words, without redirections."""
    for line in block.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&<>")
        lexer.whitespace_split = True
        command, words = [], iter(lexer)
        for word in words:
            if word in ("&&", "|"):
                yield command
                command = []
            elif word in (">", "<"):
                next(words)
            else:
                command.append(word)
        if command:
            yield command


def check(command):
    """Fail unless the command would be accepted: its options exist, and what it names in this tree is there."""
    program, *arguments = command
    program = program.removeprefix(".venv/bin/")
    if program in ("python", "python3") and arguments[:1] == ["-m"]:
        program, arguments = arguments[1], arguments[2:]
    if program == "mambavision":
        check_ours(arguments)
    elif program == "pytest":
        check_pytest(arguments)
    elif program == "pip":
        assert arguments[:2] == ["install", "-e"]
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", arguments[2])[1]
        declared = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
        assert all(f"\n{extra} = [" in declared for extra in (extras or "").split(",") if extra)
    elif program == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in arguments)
    elif program == "npm":
        assert arguments[:2] == ["--prefix", "web"]
        scripts = json.loads((ROOT / "web" / "package.json").read_text())["scripts"]
        assert arguments[2:] in (["ci"], ["test"], *(["run", script] for script in scripts))
    elif program in ("python", "python3"):
        assert (ROOT / arguments[0]).is_file(), arguments[0]
    elif program.startswith(".ci/"):
        assert os.access(ROOT / program, os.X_OK)
    else:
        assert program in ("cat", "git", "pre-commit", "source", "venv"), program


def check_ours(arguments):
    name, *rest = arguments
    assert name in cli.COMMANDS
    if name != "train":
        importlib.import_module(f"mambavision.cli.{name}").build_parser().parse_args(rest)
    elif rest != ["--help"]:
        parse_training(rest, Console(quiet=True))


def check_pytest(arguments):
    files, selection, marker = [], None, None
    words = iter(arguments)
    for word in words:
        if word == "-k":
            selection = next(words)
        elif word == "-m":
            marker = next(words)
        elif word.startswith("-"):
            assert word in ("-q", "--durations=15")
        else:
            files.append(ROOT / word)
    names = [name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)]
    for part in selection.split(" or ") if selection else ():
        assert any(part in name for name in names), f"no test of {files} has {part!r} in its name"
    assert marker is None or f'"{marker}:' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("block", examples("bash"))
def test_commands_would_be_accepted(block, tmp_path, monkeypatch):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)  # where no run lies that a command would find
    for command in commands(block):
        check(command)


@pytest.mark.parametrize(
    "command",
    [
        "mambavision clasify cat.jpg",
        "mambavision classify cat.jpg --topk",
        "mambavision train --data pictures --epoch-count 3",
        "mambavision train --config recipes/none.yaml",
        "pip install -e .[everything]",
        "make coffee",
        "npm --prefix web run coffee",
        "python benchmarks/none.py",
        "python -m pytest tests/test_readme.py -k nothing_of_the_kind",
        "conda install mambavision",
    ],
)
def test_commands_that_would_not_be_accepted_are_found(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (words,) = commands(command)
    with pytest.raises((AssertionError, SystemExit, TypeError, UsageError)):
        check(words)


def test_commands_within_sentences_would_be_accepted():
    for path in DOCUMENTS:
        prose = FENCE.sub("", path.read_text())
        for text in re.findall(r"`((?:python -m pytest|make|python benchmarks/\w+\.py) [^`]*)`", prose):
            for command in commands(text):
                check(command)


# ---- links -----------------------------------------------------------------------------------------------------------


def anchors(path):
    """The names under which a document's headings can be linked."""
    prose = FENCE.sub("", path.read_text())
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text())):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{path.name}: {link}"
        assert not anchor or anchor in anchors(file), f"{path.name}: {link}"
