"""Fetching through huggingface_hub, against a cache and a hub on this machine."""

import dataclasses
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, utils
from huggingface_hub.errors import LocalEntryNotFoundError

from mambavision.factory import create_model
from mambavision.weights import WEIGHTS, CheckpointError, fetch_weights, fetching, read_checkpoint
from weight_files import hub_cache, hub_server, public_archive, public_repository

TINY_1K = "mamba_vision_T"
REPOSITORY = "nvidia/MambaVision-T-1K"
ARCHIVE = "mambavision_tiny_1k.pth.tar"
TENSORS = {"patch_embed.conv_down.0.weight": torch.arange(27.0).reshape(1, 3, 3, 3)}
OTHER = {name: tensor + 1 for name, tensor in TENSORS.items()}


@pytest.fixture(autouse=True)
def offline_hub(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no connections; the hub reads its variables once, at import."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_connections()
    fetching.say_license.cache_clear()
    return tmp_path / "cache"


def forget_connections() -> None:
    """Those of huggingface_hub before 1.0 stay offline, once they were."""
    getattr(utils, "reset_sessions", lambda: None)()


@pytest.fixture
def repository(tmp_path) -> Path:
    """Files of the public repository: other numbers in the archive, to tell which file was taken."""
    folder = public_repository(tmp_path / "hub" / REPOSITORY, TENSORS, {"model_type": "other"})
    public_archive(folder / ARCHIVE, OTHER)
    return folder


def first_tensor(path: Path) -> torch.Tensor:
    return next(iter(read_checkpoint(path).state_dict.values()))


# From the cache, offline


def test_safetensors_come_first(offline_hub, repository):
    hub_cache(offline_hub, REPOSITORY, repository)
    path = fetch_weights(TINY_1K)
    assert path.name == "model.safetensors"
    assert offline_hub in path.parents
    assert first_tensor(path).equal(TENSORS["patch_embed.conv_down.0.weight"])


def test_the_archive_serves_a_repository_without_safetensors(offline_hub, repository):
    (repository / "model.safetensors").unlink()
    hub_cache(offline_hub, REPOSITORY, repository)
    path = fetch_weights(TINY_1K)
    assert path.name == ARCHIVE
    assert first_tensor(path).equal(OTHER["patch_embed.conv_down.0.weight"])


@pytest.mark.parametrize("variant", [variant for variant, spec in WEIGHTS.items() if spec.repo_id])
def test_every_variant_finds_its_repository(offline_hub, tmp_path, variant):
    spec = WEIGHTS[variant]
    hub_cache(offline_hub, spec.repo_id, public_repository(tmp_path / "files", TENSORS, {}))
    assert f"models--nvidia--MambaVision-{spec.repo_id.partition('-')[2]}" in str(fetch_weights(variant))


def test_the_license_is_said_once(offline_hub, repository, caplog):
    hub_cache(offline_hub, REPOSITORY, repository)
    fetch_weights(TINY_1K)
    fetch_weights(TINY_1K)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.name == "mambavision.weights.fetching"
    assert record.getMessage() == (
        f"The weights of {TINY_1K} (https://huggingface.co/{REPOSITORY}) are licensed CC-BY-NC-SA-4.0."
    )


def test_offline_without_the_file_is_one_sentence(offline_hub, caplog):
    with pytest.raises(CheckpointError) as caught:
        fetch_weights(TINY_1K)
    assert str(caught.value) == (
        f"The weights of {TINY_1K} cannot be fetched from {REPOSITORY}: offline mode is on (HF_HUB_OFFLINE) and the "
        f"cache {offline_hub} has no model.safetensors or {ARCHIVE}; pass a file that you have as model_path or "
        "checkpoint_path, or try again when connected."
    )
    assert isinstance(caught.value.__cause__, OSError)
    assert not caplog.records


# model_path


def test_an_existing_model_path_is_taken_as_it_is(tmp_path):
    path = public_archive(tmp_path / "mine.pth.tar", TENSORS)
    assert fetch_weights(TINY_1K, model_path=path) == path
    assert fetch_weights("mamba_vision_test_tiny", model_path=str(path)) == path


def test_a_missing_model_path_receives_the_archive(offline_hub, repository, tmp_path, caplog):
    hub_cache(offline_hub, REPOSITORY, repository)
    target = tmp_path / "new folder" / "any name.pth.tar"
    assert fetch_weights(TINY_1K, model_path=str(target)) == target
    assert target.read_bytes() == (repository / ARCHIVE).read_bytes()
    assert not target.is_symlink()
    assert os.listdir(target.parent) == [target.name]
    assert "CC-BY-NC-SA-4.0" in caplog.text


def test_an_interrupted_copy_leaves_nothing(offline_hub, repository, tmp_path, monkeypatch):
    hub_cache(offline_hub, REPOSITORY, repository)

    def interrupted(_source, target):
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching.shutil, "copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_weights(TINY_1K, model_path=tmp_path / "new" / "a.pth.tar")
    assert not os.listdir(tmp_path / "new")


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = public_archive(tmp_path / "mine.pth.tar", TENSORS)
    assert fetch_weights(TINY_1K, model_path="~/mine.pth.tar") == path


def test_create_model_as_in_the_public_readme(offline_hub, tmp_path, monkeypatch):
    """`create_model(name, pretrained=True, model_path=...)` downloads to the path once, then reads it from there."""
    torch.manual_seed(0)
    source = create_model("mamba_vision_test_tiny").eval()
    spec = dataclasses.replace(WEIGHTS[TINY_1K], variant="mamba_vision_test_tiny")
    monkeypatch.setitem(WEIGHTS, "mamba_vision_test_tiny", spec)
    (tmp_path / "files").mkdir()
    public_archive(tmp_path / "files" / ARCHIVE, source.state_dict())
    cache = hub_cache(offline_hub, REPOSITORY, tmp_path / "files")
    target = tmp_path / "mambavision_tiny_1k.pth.tar"
    pictures = torch.rand(1, 3, 64, 64)
    for _ in range(2):
        model = create_model("mamba_vision_test_tiny", pretrained=True, model_path=str(target))
        assert model(pictures).equal(source(pictures))
        shutil.rmtree(cache, ignore_errors=True)  # the second time there is only the file


# Weights that ship, and none at all


def test_the_shipped_file_is_taken_from_the_package(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("mambavision.weights.table.ASSETS", tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks its file mamba_vision_nano_32\.safetensors; install it again"):
        fetch_weights("mamba_vision_nano_32")
    (tmp_path / "mamba_vision_nano_32.safetensors").touch()
    assert fetch_weights("mamba_vision_nano_32") == tmp_path / "mamba_vision_nano_32.safetensors"
    assert not caplog.records
    with pytest.raises(CheckpointError, match="mamba_vision_nano_32 ships in the package: omit"):
        fetch_weights("mamba_vision_nano_32", model_path=tmp_path / "nowhere.pth.tar")


def test_variants_without_weights_are_said():
    with pytest.raises(CheckpointError, match="no published weights for mamba_vision_test_tiny; there are for mamba_"):
        fetch_weights("mamba_vision_test_tiny")


# Over HTTP


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> Iterator[tuple[str, list[str]]]:
    """A hub on this machine, as if HF_ENDPOINT named it; its address and what it sent."""
    (tmp_path / "hub").mkdir(exist_ok=True)
    with hub_server(tmp_path / "hub") as (endpoint, sent):
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        forget_connections()
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for module in ("constants", "file_download"):  # the second one's own copy before 1.0
            monkeypatch.setattr(f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield endpoint, sent


def test_downloads_are_kept_for_offline_mode(repository, mirror, monkeypatch):
    path = fetch_weights(TINY_1K)
    assert path.read_bytes() == (repository / "model.safetensors").read_bytes()
    assert fetch_weights(TINY_1K) == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_weights(TINY_1K) == path
    assert mirror[1] == [f"/{REPOSITORY}/resolve/main/model.safetensors"]


def test_a_repository_without_safetensors_sends_the_archive(repository, mirror, tmp_path):
    (repository / "model.safetensors").unlink()
    target = tmp_path / ARCHIVE
    assert fetch_weights(TINY_1K).name == ARCHIVE
    assert fetch_weights(TINY_1K, model_path=target) == target
    assert target.read_bytes() == (repository / ARCHIVE).read_bytes()
    assert mirror[1] == [f"/{REPOSITORY}/resolve/main/{ARCHIVE}"]  # once: the second time it was in the cache


def test_an_unreachable_hub_is_asked_once(offline_hub, monkeypatch):
    asked = []

    def refused(repo_id, name, *, local_files_only):
        asked.append((repo_id, name, local_files_only))
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    with pytest.raises(CheckpointError, match=f"{constants.ENDPOINT} gave no usable answer and the cache"):
        fetch_weights(TINY_1K)
    assert asked == [(REPOSITORY, "model.safetensors", False), (REPOSITORY, ARCHIVE, True)]


@pytest.mark.usefixtures("mirror")
def test_missing_repositories_and_files_are_one_sentence(tmp_path):
    with pytest.raises(CheckpointError) as no_repository:
        fetch_weights(TINY_1K)
    (tmp_path / "hub" / REPOSITORY).mkdir(parents=True)
    with pytest.raises(CheckpointError) as no_file:
        fetch_weights(TINY_1K)
    assert f"cannot be fetched from {REPOSITORY}: the hub answered Repos" in str(no_repository.value)
    assert f"the repository has no model.safetensors or {ARCHIVE};" in str(no_file.value)
    assert not {"\n"} & set(f"{no_repository.value}{no_file.value}")


def test_the_variables_of_the_hub_rule(repository, tmp_path):
    """In a process of its own, because the hub reads them at import."""
    script = "from mambavision.weights import fetch_weights; print(fetch_weights('mamba_vision_T'))"
    with hub_server(tmp_path / "hub") as (endpoint, sent):
        variables = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "elsewhere"), "HF_HUB_OFFLINE": "0"}
        variables.update(HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1", PYTHONPATH=os.pathsep.join(sys.path))
        command = [sys.executable, "-c", script]
        run = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(tmp_path / "elsewhere"))
    assert Path(run.stdout.strip()).read_bytes() == (repository / "model.safetensors").read_bytes()
    assert sent == [f"/{REPOSITORY}/resolve/main/model.safetensors"]
    assert run.stderr.count("CC-BY-NC-SA-4.0") == 1  # seen although the script sets up no logging
