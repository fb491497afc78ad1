"""Finding pictures: in folders, by globs, and those that ship with the package."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mambavision.inference.images import printable, reason

SAMPLES = Path(__file__).parents[1] / "assets" / "samples"
# What is taken from a folder; a file named on its own may have any suffix. HEIC is here to be named, not passed over.
SUFFIXES = frozenset(
    """
    .apng .avif .bmp .dib .gif .heic .heif .j2k .jfif .jp2 .jpe .jpeg .jpg
    .pbm .pgm .png .pnm .ppm .qoi .tga .tif .tiff .webp
    """.split()  # noqa: SIM905  (reads better than 23 quoted strings)
)


def sample_pictures() -> list[Path]:
    """The photographs that ship with the package; SOURCES.md beside them tells where each comes from."""
    return _pictures_in(SAMPLES, [])


def find_pictures(paths: Iterable[str]) -> tuple[list[Path], list[str]]:
    """Files behind the arguments of a command line.

    Args:
        paths: files, folders (searched for pictures with all their subfolders, hidden ones excepted) and glob
            patterns (`**` for any folders), which are expanded where no file of that very name exists.

    Returns:
        Files in the order of the arguments, sorted within each; and one sentence for each argument that gave none.
    """
    found: list[Path] = []
    problems: list[str] = []
    for path in paths:
        if "://" in path:
            problems.append(f"{printable(path)} is a URL, which is not fetched; download the picture first.")
        elif os.path.isdir(path):
            found += _pictures_in(Path(path), problems)
        elif glob.has_magic(path) and not os.path.lexists(path):
            matches = sorted(glob.glob(path, recursive=True))
            if not matches:
                problems.append(f"{printable(path)} matches no file.")
            for match in map(Path, matches):
                # A pattern ending in ** matches the files of a folder beside the folder itself.
                if not match.is_dir():
                    found.append(match)
                elif "**" not in path:
                    found += _pictures_in(match, problems)
        else:
            found.append(Path(path))
    return found, problems


def _pictures_in(folder: Path, problems: list[str]) -> list[Path]:
    def report(error: OSError) -> None:
        problems.append(f"{printable(str(error.filename))} cannot be searched: {reason(error)}.")

    reported = len(problems)
    found = sorted(walk_pictures(folder, report))
    if not found and len(problems) == reported:
        problems.append(f"{printable(str(folder))} is a folder without pictures.")
    return found


def walk_pictures(folder: Path, report: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """Pictures in a folder and its subfolders, by suffix and in no order; what is hidden is passed over.

    Args:
        folder: where to search.
        report: called with the error of each folder that cannot be searched.
    """
    for parent, folders, files in os.walk(folder, onerror=report):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(parent, name)
