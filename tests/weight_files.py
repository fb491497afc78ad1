"""Builders of weight files in every public layout, and a hub on this machine that serves them."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.server
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mambavision.config import MambaVisionConfig
from mambavision.models.classifier import MambaVision

# What the public repositories ask transformers to run: their own code.
REMOTE_CLASSES = {
    "AutoConfig": "configuration_mambavision.MambaVisionConfig",
    "AutoModel": "modeling_mambavision.MambaVisionModel",
    "AutoModelForImageClassification": "modeling_mambavision.MambaVisionModelForImageClassification",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def training_flags() -> argparse.Namespace:
    """Flags as a training script leaves them in a checkpoint."""
    return argparse.Namespace(
        model="mamba_vision_T", lr=5e-4, betas=[0.9, 0.999], opt_eps=None, amp=True, sched=("a", 1)
    )


def public_archive(path: Path, state_dict: Mapping[str, torch.Tensor], **beside: Any) -> Path:
    """`.pth.tar` of the public layout: weights under `state_dict`, flags, epoch and optimiser state beside them."""
    momentum = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    content = {"epoch": 299, "arch": "mamba_vision_T", "state_dict": dict(state_dict), "optimizer": momentum}
    torch.save({**content, "args": training_flags(), **beside}, path)
    return path


def public_config(config: MambaVisionConfig, **changes: Any) -> dict[str, Any]:
    """`config.json` of the public repositories."""
    names = config.class_names or [f"class {index}" for index in range(config.num_classes)]
    shape = {key: getattr(config, key) for key in ("dim", "in_dim", "depths", "num_heads", "window_size", "mlp_ratio")}
    rates = {key: getattr(config, key) for key in ("drop_path_rate", "layer_scale", "layer_scale_conv")}
    seen = {key: getattr(config.preprocessing, key) for key in ("mean", "std", "crop_pct", "crop_mode")}
    remote_code = {"auto_map": REMOTE_CLASSES}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    return {"model_type": "mambavision", **shape, **rates, **seen, **labels, **remote_code, **changes}


def public_repository(folder: Path, state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Path:
    """Folder with the `model.safetensors` and `config.json` of a public repository."""
    folder.mkdir(parents=True, exist_ok=True)
    prefixed = {f"model.{name}": tensor.contiguous() for name, tensor in state_dict.items()}
    save_file(prefixed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def remote_repository(folder: Path, network: MambaVision, **changes: Any) -> Path:
    """A repository as the public ones are: code of its own, that must not run, and no `preprocessor_config.json`."""
    public_repository(folder, network.state_dict(), public_config(network.config, torch_dtype="float32", **changes))
    for place in set(REMOTE_CLASSES.values()):
        (folder / f"{place.split('.')[0]}.py").write_text("raise AssertionError('remote code was run')\n")
    return folder


def use_hub_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Make transformers and the hub's library look into `cache`, and nowhere else."""
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
            monkeypatch.setattr(f"{module}.{name}", str(cache), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def hub_cache(cache: Path, repo_id: str, files: Path) -> Path:
    """The hub's cache after the files of the folder `files` were downloaded from `repo_id`."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file in files.iterdir():
        content = file.read_bytes()
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return cache


@contextlib.contextmanager
def hub_server(root: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub serving `root/<owner>/<name>/<file>`; yields its address and the list of paths it was asked to send."""
    sent: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            repo_id, _, name = self.path.strip("/").partition("/resolve/main/")
            file = root / repo_id / name
            if not (name and file.is_file()):
                missing_repository = not (root / repo_id).is_dir()
                self.send_response(401 if missing_repository else 404)
                self.send_header("X-Error-Code", "RepoNotFound" if missing_repository else "EntryNotFound")
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                sent.append(self.path)
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Keep the test output quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", sent
        finally:
            server.shutdown()
            thread.join()
