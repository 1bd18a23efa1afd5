"""Files that are written whole or not at all."""

import csv
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from biper.errors import UsageError


class atomically:
    """Context: gives a temporary path beside `path` and, if nothing was raised, moves it over `path` at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp")  # one name: a killed run leaves at most one behind

    def __enter__(self) -> Path:
        if not self.path.absolute().parent.is_dir():
            raise FileNotFoundError(f"{self.path} cannot be written: there is no folder {self.path.parent}")
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                with self.temporary.open("rb+") as file:
                    os.fsync(file.fileno())  # on disk before its name is, or a power cut leaves an empty file
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)


@contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """Context: gives a new folder; if nothing was raised it takes the place of `path`, which is missing or empty."""
    path = path.absolute()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".biper-") as place:
        folder = Path(place) / path.name
        folder.mkdir()
        yield folder
        if path.exists():
            path.rmdir()
        folder.rename(path)


def require_empty(folder: Path) -> None:
    """Raise UsageError for a folder that cannot be written, or has something in it."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: give a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty: give a folder that does not exist yet")
    if folder.resolve() == Path.cwd():
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
