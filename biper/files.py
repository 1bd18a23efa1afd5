"""Files that are written whole or not at all."""

import csv
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path
from typing import Any

from biper.errors import UsageError

PREFIX = ".biper-"  # of folders that are being written


def followed(path: Path) -> Path:
    """Where a path leads, links followed; unlike `Path.resolve` it takes a link that leads to itself."""
    return Path(os.path.realpath(path))


@contextmanager
def named_by(path: Path, temporary: Path) -> Iterator[None]:
    """Context: an OSError of what is written at a temporary place says what was to be written, `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path} cannot be written: {error}") from error
        if error.filename is not None and not str(error.filename).startswith(str(temporary)):
            raise  # of another file
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Context: gives a temporary path beside `path` and, if nothing was raised, moves it over `path` at the end.

    It takes a link's place too: what another run has, to which it may lead, stays as it is.
    """
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.tmp")  # one name: a killed run leaves at most one behind
    try:
        with named_by(path, temporary):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())  # on disk before its name is, or a power cut leaves an empty file
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # where nothing can be written, nothing can be removed, and the first error counts
            temporary.unlink(missing_ok=True)


@contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """Context: gives a new folder; if nothing was raised it takes the place of `path`, which is missing or empty."""
    path = followed(path)
    with (
        named_by(path, path.parent / PREFIX),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=PREFIX, ignore_cleanup_errors=True) as place,
    ):
        folder = Path(place) / path.name
        folder.mkdir()
        yield folder
        if path.exists():
            path.rmdir()
        folder.rename(path)


def require_empty(folder: Path) -> None:
    """Raise UsageError for a folder that cannot be written, or has something in it."""
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        what = "is a file" if folder.is_file() else "is no folder"
        raise UsageError(f"{folder} {what}: give a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty: give a folder that does not exist yet")
    if followed(folder) == Path.cwd():
        raise UsageError(f"{folder} is the folder of this command: give one that does not exist yet")
    if not folder.absolute().parent.is_dir():
        raise UsageError(f"{folder} cannot be written: no such folder {folder.absolute().parent}")
    if not os.access(folder.absolute().parent, os.W_OK | os.X_OK):
        raise UsageError(f"{folder} cannot be written: {folder.absolute().parent} is read-only")


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows as CSV, with full precision; None, and what a row does not have, is an empty field."""
    names = dict.fromkeys(name for row in rows for name in row)
    with atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(rows)


def write_text(text: str, path: Path) -> None:
    """A text file, whole or not at all."""
    with atomically(path) as temporary:
        temporary.write_text(text.rstrip() + "\n", encoding="utf-8")


def require_file(path: Path) -> None:
    """Raise UsageError unless there is a regular file: a pipe or a device may have no end, and no beginning either."""
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "it is no file" if path.exists() else "No such file or directory"
        raise UsageError(f"cannot read {path}: {what}")


def require_different(paths: Mapping[str, Path]) -> None:
    """Raise UsageError where two of the files to be written are one. paths: by the flag."""
    for (flag, path), (other, same) in combinations(paths.items(), 2):
        if followed(path) == followed(same):
            raise UsageError(f"{flag} and {other} are both {path}: give two names")


def require_free(path: Path, ours: Callable[[Path], bool]) -> None:
    """Raise UsageError before work is done for a file that cannot be written, or would take the place of another kind.

    ours: whether a file that is there may be replaced.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"{path} cannot be written: " + ("it is a folder" if path.is_dir() else "no such folder"))
    if path.exists() and not (path.is_file() and ours(path)):
        raise UsageError(f"{path} exists and is another kind of file: give another name")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path} cannot be written: its folder is read-only")
