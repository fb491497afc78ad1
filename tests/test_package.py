"""What is installed: the wheel, built from this tree without a network, and what its metadata promises."""

import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mambavision
from mambavision.config import VARIANTS
from mambavision.weights import WEIGHTS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
CORE = {"huggingface_hub", "numpy", "pillow", "rich", "safetensors", "torch", "torchvision"}
EXTRAS = {"all", "dev", "embed", "executorch", "export", "huggingface", "openvino", "timm", "train"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel's files, unpacked, built by the declared backend from a copy of what it takes."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    shutil.copytree(SOURCE, tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.whl")
    assert archive.name == f"mambavision-{mambavision.__version__}-py3-none-any.whl"
    zipfile.ZipFile(archive).extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.fixture(scope="module")
def information(wheel):
    """Folder of the wheel's metadata."""
    return wheel / f"mambavision-{mambavision.__version__}.dist-info"


@pytest.fixture(scope="module")
def metadata(information):
    return email.message_from_string((information / "METADATA").read_text(encoding="utf-8"))


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel, information):
    ours = {name for name in files(SOURCE / "mambavision") if "__pycache__" not in name}
    assert files(wheel / "mambavision") == ours
    assert {path.name for path in wheel.iterdir()} == {"mambavision", information.name}
    assert {
        "py.typed",
        "assets/samples/SOURCES.md",
        "assets/samples/cat.jpg",
        "ops/selective_scan/reference.py",
    } <= ours


def test_license_and_notice_are_in_it(information, metadata):
    for name in ("LICENSE", "NOTICE"):
        assert (information / "licenses" / name).read_bytes() == (ROOT / name).read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"
    license_text = (ROOT / "LICENSE").read_text()
    assert all(text in license_text for text in ("Version 2.0, January 2004", "9. Accepting Warranty", "END OF TERMS"))


def test_metadata(metadata):
    assert (metadata["Name"], metadata["Version"]) == ("mambavision", mambavision.__version__)
    assert metadata["Requires-Python"] == ">=3.10"
    versions = [line.rpartition(" ")[2] for line in metadata.get_all("Classifier") if " Python :: 3." in line]
    assert versions == ["3.10", "3.11", "3.12", "3.13"]
    assert "# MambaVision" in metadata.get_payload()


def test_core_dependencies_are_few_and_loose(metadata):
    core = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {line.partition(">=")[0] for line in core} == CORE
    assert not [line for line in metadata.get_all("Requires-Dist") if "==" in line.partition(";")[0] or "<" in line]


def test_extras(metadata):
    needs = {extra: [] for extra in metadata.get_all("Provides-Extra")}
    for line in metadata.get_all("Requires-Dist"):
        requirement, _, marker = line.partition(";")
        if "extra ==" in marker:
            needs[marker.partition("extra ==")[2].strip(" \"'")].append(requirement.partition(">=")[0].strip())
    assert set(needs) == EXTRAS
    assert all(needs.values())
    assert needs["all"] == ["mambavision[embed,export,huggingface,timm,train]"]
    assert {"mambavision[embed,export,huggingface,timm,train]", "pytest", "ruff", "mypy"} <= set(needs["dev"])


def test_the_command_is_installed(information):
    lines = (information / "entry_points.txt").read_text().split()
    assert lines == ["[console_scripts]", "mambavision", "=", "mambavision.cli:main"]


def test_the_unpacked_wheel_works_elsewhere(wheel, tmp_path):
    script = (
        "import mambavision; from mambavision.inference.images import read_image; "
        "from mambavision.inference.picture_files import sample_pictures; "
        "print(mambavision.__file__, len([read_image(path) for path in sample_pictures()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        check=False,
    )
    file, count = done.stdout.split()
    assert Path(file) == wheel / "mambavision" / "__init__.py", done.stderr
    assert int(count) >= 3


@pytest.mark.parametrize("variant", [variant for variant, spec in WEIGHTS.items() if spec.repo_id is None])
def test_weights_that_ship_are_in_the_wheel_with_their_record(wheel, variant):
    assert variant in VARIANTS
    file = wheel / WEIGHTS[variant].asset.relative_to(SOURCE)
    assert file.is_file(), f"{file.name} is not in the package"
    assert file.stat().st_size <= 8_000_000
    assert file.with_suffix(".json").is_file()
    assert 0 < WEIGHTS[variant].parameters < 4_000_000
    assert WEIGHTS[variant].top1 >= 96


def test_public_weights_are_not_in_the_wheel(wheel):
    suffixes = {".safetensors", ".tar", ".pth", ".pt", ".bin"}
    shipped = {spec.asset.name for spec in WEIGHTS.values() if spec.repo_id is None}
    assert {Path(name).name for name in files(wheel) if Path(name).suffix in suffixes} <= shipped
