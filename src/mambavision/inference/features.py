"""A table of pictures' vectors: a file of it (.npz or .parquet), and nearest neighbours by cosine.

A `.npz` holds `paths` (text), `vectors` (float32, a row a picture) and `metadata` (JSON) and needs numpy alone to read;
a `.parquet` has the columns `path` and `vector`, and the JSON in its schema under the key `mambavision`.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mambavision.files import replaced_when_done
from mambavision.inference.images import printable

SUFFIXES = (".npz", ".parquet")
HEADER_KEY = b"mambavision"
_QUERIES = 1024  # compared at once


class FeaturesError(ValueError):
    """A file of vectors that cannot be written, read or used; the message is one sentence."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A picture near another: its path, and the cosine of the angle between their vectors."""

    path: str
    cosine: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """Pictures and their vectors.

    Attributes:
        paths: a path a picture.
        vectors: (pictures, channels), float32.
        metadata: the network, a hash of its weights, and its preprocessing.
    """

    paths: tuple[str, ...]
    vectors: np.ndarray
    metadata: dict[str, Any]

    def nearest(
        self, vectors: np.ndarray | Sequence[np.ndarray], k: int = 5, *, queries: Sequence[str | None] | None = None
    ) -> list[list[Neighbour]]:
        """The k pictures nearest to each of `vectors`, best first; all when there are fewer.

        Args:
            vectors: (queries, channels), or a list of (channels,).
            k: neighbours a query.
            queries: paths that `vectors` belong to, which are not neighbours of themselves.

        Raises:
            ValueError: `k` is below 1 or the vectors are of another length.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        vectors = np.asarray(vectors)
        if vectors.ndim != 2 or vectors.shape[1] != self.vectors.shape[1]:
            raise ValueError(f"Vectors must be (queries, {self.vectors.shape[1]}), got {vectors.shape}.")
        places: dict[str, list[int]] = {}
        for place, path in enumerate(self.paths):
            places.setdefault(os.path.abspath(path), []).append(place)
        table = _unit(self.vectors)
        found = []
        for first in range(0, len(vectors), _QUERIES):
            cosines = _unit(vectors[first : first + _QUERIES]) @ table.T
            for row, values in enumerate(cosines):
                query = None if queries is None else queries[first + row]
                if query is not None:
                    values[places.get(os.path.abspath(query), [])] = -np.inf
                order = np.argsort(-values, kind="stable")[:k]
                near = [Neighbour(path=self.paths[place], cosine=float(values[place])) for place in order]
                found.append([neighbour for neighbour in near if np.isfinite(neighbour.cosine)])
        return found


def check_output(path: Path) -> None:
    """Fail unless vectors can be written to `path`: its suffix is known, and what it needs is installed.

    Raises:
        FeaturesError: one sentence with the remedy.
    """
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise FeaturesError(f"{path} must be a file that ends in {' or '.join(SUFFIXES)}.")
    if path.suffix.lower() == ".parquet":
        _pyarrow()


def save_features(features: Features, path: str | os.PathLike[str]) -> None:
    """Write a `.npz` or a `.parquet`, atomically.

    Raises:
        FeaturesError: another suffix, or pyarrow is not installed.
    """
    path = Path(path)
    check_output(path)
    header = json.dumps(features.metadata)
    with replaced_when_done(path) as temporary:
        if path.suffix.lower() == ".npz":
            with open(temporary, "wb") as file:  # of a name, numpy would make another one
                np.savez(file, paths=np.array(features.paths), vectors=features.vectors, metadata=np.array(header))
            return
        pyarrow = _pyarrow()
        values = pyarrow.array(features.vectors.reshape(-1))
        columns = {
            "path": pyarrow.array([_encodable(name) for name in features.paths], pyarrow.string()),
            "vector": pyarrow.FixedSizeListArray.from_arrays(values, features.vectors.shape[1]),
        }
        table = pyarrow.table(columns).replace_schema_metadata({HEADER_KEY: header.encode()})
        pyarrow.parquet.write_table(table, temporary)


def load_features(path: str | os.PathLike[str]) -> Features:
    """Read what `save_features` wrote.

    Raises:
        FeaturesError: there is no such file, it is something else or broken, or pyarrow is not installed.
    """
    path = Path(path)
    if path.suffix.lower() == ".parquet":
        pyarrow = _pyarrow()
        if not path.exists():
            raise FeaturesError(f"{path} does not exist.")
        try:
            table = pyarrow.parquet.read_table(path)
            metadata = json.loads(table.schema.metadata[HEADER_KEY])
            vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
            return Features(paths=tuple(table["path"].to_pylist()), vectors=vectors, metadata=metadata)
        except (pyarrow.ArrowException, KeyError, TypeError, ValueError) as error:
            raise FeaturesError(f"{path} is not a table of vectors that `mambavision embed` wrote.") from error
    try:
        with np.load(path, allow_pickle=False) as file:
            metadata = json.loads(str(file["metadata"]))
            return Features(paths=tuple(file["paths"].tolist()), vectors=file["vectors"], metadata=metadata)
    except FileNotFoundError:
        raise FeaturesError(f"{path} does not exist.") from None
    except (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError, IndexError) as error:
        raise FeaturesError(f"{path} is not a table of vectors that `mambavision embed` wrote.") from error


def _encodable(text: str) -> str:
    """`text` as UTF-8 can hold it; undecodable bytes of a file's name become replacement characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return printable(text)
    return text


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; rows of zeros stay."""
    vectors = vectors.astype(np.float32, copy=False)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise FeaturesError("A .parquet file needs pyarrow, which is not installed: pip install pyarrow.") from error
    return pyarrow
