"""Pictures as vectors: the pooled output of the final norm, which the head would classify.

`embed` gives vectors one by one; `embed_files` makes a table of many files and, killed in between, continues.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambavision.inference.features import Features, FeaturesError, check_output, save_features
from mambavision.inference.images import Picture
from mambavision.inference.predictor import PACKAGED_MODEL, Predictor

PARTIAL = ".partial"  # added to the name of the file to be
# What must be the same for vectors to be comparable.
_IDENTITY = ("weights_sha256", "preprocessing", "in_chans")


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """One picture's vector, or why there is none.

    Attributes:
        source: the picture's path, or what it is called without one.
        vector: (channels,), float32, whatever the picture's size.
        error: one sentence when there is no vector.
    """

    source: str
    vector: np.ndarray | None = None
    error: str | None = None


def embed(predictor: Predictor, pictures: Picture | Iterable[Picture]) -> Iterator[Embedding]:
    """The vectors of pictures, in order, a batch at a time; one that cannot be read comes with its error."""
    for batch in predictor.prepare(pictures):
        inputs = [prepared.input for prepared in batch if prepared.input is not None]
        vectors: Iterator[np.ndarray] = iter(())
        if inputs:
            with torch.inference_mode():
                maps = predictor.model.forward_features(predictor.to_network(torch.stack(inputs)))
                vectors = iter(predictor.model.forward_head(maps, pre_logits=True).float().cpu().numpy())
        for prepared in batch:
            vector = None if prepared.input is None else next(vectors)
            error = prepared.error
            if vector is not None and not np.isfinite(vector).all():
                vector, error = None, f"{prepared.source}: the network's output is not finite."
            yield Embedding(source=prepared.source, vector=vector, error=error)


def describe(predictor: Predictor, *, model: str | None = None, checkpoint: str | None = None) -> dict[str, Any]:
    """What a table of vectors says of its network: names, a hash of the weights, preprocessing and channels.

    Args:
        predictor: the network.
        model: its name; with neither, that of the model in the package.
        checkpoint: the file its weights are from.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(predictor.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        "model": model if model or checkpoint else PACKAGED_MODEL,
        "checkpoint": checkpoint,
        "weights_sha256": digest.hexdigest(),
        "preprocessing": json.loads(json.dumps(asdict(predictor.config.preprocessing))),  # tuples as lists
        "in_chans": predictor.config.in_chans,
        "channels": predictor.model.num_features,
    }


def same_network(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether vectors with these two descriptions can be compared."""
    return all(first.get(name) == second.get(name) for name in _IDENTITY)


def embed_files(
    predictor: Predictor,
    paths: Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    metadata: dict[str, Any] | None = None,
    report: Callable[[Embedding], None] | None = None,
    resumed: Callable[[int], None] | None = None,
) -> tuple[Features, list[Embedding]]:
    """Write a table with the vector of every file, continuing where an earlier run with the same output was killed.

    Until all are done they are kept in a file beside the output, its name with `.partial`. Files that have changed
    since, by size or time, are done again.

    Args:
        predictor: the network.
        paths: picture files; each is taken once.
        output: `.npz` or `.parquet` file, which is replaced.
        metadata: what `describe` gave; None for that of `predictor` without a name.
        report: called with each embedding in order of completion, those of an earlier run first.
        resumed: called with the number of files that an earlier run has done, if any.

    Returns:
        The table in the order of `paths`, and the files that have no vector. Without any vector nothing is written.

    Raises:
        FeaturesError: the output cannot be written, or what is beside it belongs to other weights.
    """
    output = Path(output)
    check_output(output)
    metadata = {**describe(predictor), "model": None} if metadata is None else metadata
    wanted = list(dict.fromkeys(os.fspath(path) for path in paths))
    bad = []
    with _Partial(output.with_name(output.name + PARTIAL), metadata) as partial:
        done = {path: vector for path in wanted if (vector := partial.vector(path)) is not None}
        if done and resumed is not None:
            resumed(len(done))
        for path, vector in done.items():
            if report is not None:
                report(Embedding(source=path, vector=vector))
        stamps = _Stamps(path for path in wanted if path not in done)
        for path, embedding in zip(stamps.paths, embed(predictor, stamps), strict=True):
            if embedding.vector is None:
                bad.append(embedding)
            else:
                done[path] = embedding.vector
                partial.add(path, stamps.taken.pop(path), embedding.vector)
            if report is not None:
                report(embedding)
        vectors = [done[path] for path in wanted if path in done]
        features = Features(
            paths=tuple(path for path in wanted if path in done),
            vectors=np.stack(vectors) if vectors else np.empty((0, predictor.model.num_features), np.float32),
            metadata=metadata,
        )
        if vectors:
            save_features(features, output)
    partial.path.unlink(missing_ok=True)
    return features, bad


class _Stamps:
    """Paths on their way into the network, each with its file's size and time as they were before it was read."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = list(paths)
        self.taken: dict[str, list[int]] = {}

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            self.taken[path] = _stamp(path)
            yield path


class _Partial:
    """A file that grows by a line a picture; a line that a kill cut off is taken away.

    The first line describes the network, each other holds path, size and time of a file and its vector.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path = path
        self._known: dict[str, tuple[list[int], np.ndarray]] = {}
        header = json.dumps(metadata)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115  (closed in __exit__)
        try:
            end = self._read(metadata)
        except BaseException:
            self._file.close()
            raise
        self._file.truncate(end)
        if end == 0:
            self._write(header)

    def __enter__(self) -> _Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def vector(self, path: str) -> np.ndarray | None:
        """That of the file as it is now, or None."""
        stamp, vector = self._known.get(path, ([], None))
        return vector if vector is not None and stamp == _stamp(path) else None

    def add(self, path: str, stamp: list[int], vector: np.ndarray) -> None:
        data = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        self._write(json.dumps({"path": path, "stamp": stamp, "vector": data}))

    def _write(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def _read(self, metadata: dict[str, Any]) -> int:
        """Fill what is known; the place behind the last whole line."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            try:
                record = json.loads(line)
                if end == 0 and not same_network(record, metadata):
                    raise FeaturesError(
                        f"{self.path} holds vectors of other weights or preprocessing; remove it to start anew."
                    )
                if end:
                    vector = np.frombuffer(base64.b64decode(record["vector"], validate=True), "<f4")
                    if not line.endswith(b"\n") or vector.shape != (metadata["channels"],):
                        break
                    self._known[record["path"]] = (record["stamp"], vector.astype(np.float32))
            except FeaturesError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError):  # cut off, or no line of ours
                break
            end += len(line)
        return end


def _stamp(path: str) -> list[int]:
    """Size and time of a file; none when it cannot be looked at, which reading it will say."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return []
    return [status.st_size, status.st_mtime_ns]
