"""Lists of image files and their classes, for data sets that are read batch by batch."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from biper.data.folder import list_split
from biper.errors import UsageError

WORDS = "words.txt"  # lines of `wnid<TAB>name`, as in Tiny ImageNet; prepare.py writes it for ImageNet


@dataclass(frozen=True)
class Samples:
    """Files relative to root, (N,) bytes, in one array, small for a million of them; labels (N,), places in classes.

    names: the classes in words, where the data say them; else equal to classes.
    """

    root: Path
    files: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """The path of an image."""
        return os.path.join(self.root, os.fsdecode(self.files[index]))


def list_folder(path: Path, train: bool) -> Samples:
    """A split of `train/<class>/*` and `val/<class>/*` (or `test`). Raises UsageError if it is missing or unfit."""
    folder, classes, found = list_split(path, train)
    return collect_samples(folder, ((str(file.relative_to(folder)), label) for file, label in found), classes, path)


def collect_samples(root: Path, found: Iterable[tuple[str, int]], classes: tuple[str, ...], path: Path) -> Samples:
    """Samples of what was found: files relative to root, with their labels. path: where words.txt may lie."""
    files, labels = zip(*found, strict=True)
    words = read_class_words(path)
    names = tuple(words.get(wnid, wnid) for wnid in classes)
    return Samples(root, np.array([os.fsencode(file) for file in files]), np.array(labels), classes, names)


def read_class_words(path: Path) -> dict[str, str]:
    """The names of the classes by their WordNet ids, from words.txt; {} without one."""
    if not (path / WORDS).is_file():
        return {}
    return dict(line.split("\t", 1) for line in read_lines(path / WORDS) if "\t" in line)


def read_lines(file: Path) -> list[str]:
    """The lines of a text file in UTF-8. Raises UsageError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}: {error}") from error
