"""Lists of image files and their classes: image folders, ImageNet, Tiny ImageNet as it is downloaded."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from biper.data.folder import class_names, list_split
from biper.errors import UsageError

WORDS = "words.txt"  # lines of `wnid<TAB>name`, as in Tiny ImageNet; prepare.py writes it for ImageNet
TINY = "tiny-imagenet-200"


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


def folder_samples(path: Path, train: bool) -> Samples:
    """A split of `train/<class>/*` and `val/<class>/*` (or `test`). Raises UsageError if it is missing or unfit."""
    folder, classes, found = list_split(path, train)
    return _samples(folder, ((str(file.relative_to(folder)), label) for file, label in found), classes, path)


def tiny_imagenet_samples(path: Path, train: bool) -> Samples:
    """A split of Tiny ImageNet in its original layout: `train/<wnid>/images/*`, `val/images/*`, `val_annotations.txt`.

    path is the folder tiny-imagenet-200 or the one that it lies in. Raises UsageError if it is missing or unfit.
    """
    path = path / TINY if (path / TINY).is_dir() else path
    if not (path / "val" / "val_annotations.txt").is_file():
        raise UsageError(f"no Tiny ImageNet in {path}: expected train/<wnid>/images and val/val_annotations.txt in it")
    if not (path / "train").is_dir():
        raise UsageError(f"no folder train in {path}: its folders name the classes")
    classes = class_names(path / "train")
    if not classes:
        raise UsageError(f"no class folders in {path / 'train'}: expected train/<wnid>/images")
    if train:
        return _samples(path / "train", _tiny_train(path / "train", classes), classes, path)
    label = {wnid: i for i, wnid in enumerate(classes)}
    lines = _lines(path / "val" / "val_annotations.txt")
    rows = [line.split("\t")[:2] for line in lines if line.strip()]
    if not rows or any(len(row) < 2 for row in rows):
        raise UsageError(f"{path}/val/val_annotations.txt is not Tiny ImageNet's: expected lines of file, tab, class")
    odd = next((wnid for _, wnid in rows if wnid not in label), None)
    if odd:
        raise UsageError(f"{path}/val/val_annotations.txt names the class {odd}, which has no folder in {path}/train")
    images = path / "val" / "images"
    missing = {file for file, _ in rows} - {entry.name for entry in os.scandir(images)} if images.is_dir() else {"all"}
    if missing:
        raise UsageError(
            f"{len(missing)} images of {path}/val/val_annotations.txt are not in {images}: unpack it again"
        )
    return _samples(images, ((file, label[wnid]) for file, wnid in rows), classes, path)


def _tiny_train(folder: Path, classes: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    for label, wnid in enumerate(classes):
        below = folder / wnid / "images"
        files = sorted(file for file in os.listdir(below) if file[0] != ".") if below.is_dir() else []
        if not files:
            raise UsageError(f"no images in {below}")
        yield from ((f"{wnid}/images/{file}", label) for file in files)


def _samples(root: Path, found: Iterable[tuple[str, int]], classes: tuple[str, ...], path: Path) -> Samples:
    files, labels = zip(*found, strict=True)
    words = class_words(path)
    names = tuple(words.get(wnid, wnid) for wnid in classes)
    return Samples(root, np.array([os.fsencode(file) for file in files]), np.array(labels), classes, names)


def class_words(path: Path) -> dict[str, str]:
    """The names of the classes by their WordNet ids, from words.txt; {} without one."""
    if not (path / WORDS).is_file():
        return {}
    return dict(line.split("\t", 1) for line in _lines(path / WORDS) if "\t" in line)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}: {error}") from error
