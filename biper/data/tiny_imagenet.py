"""Tiny ImageNet as it is downloaded: 200 classes of 64x64 pixels."""

import os
from collections.abc import Iterator
from pathlib import Path

from biper.data.crops import Whole
from biper.data.datasets import StreamSet
from biper.data.folder import list_classes
from biper.data.samples import Samples, collect_samples, read_lines
from biper.data.stream import Augmentation
from biper.errors import UsageError

FOLDER = "tiny-imagenet-200"  # that its archive unpacks to


def list_tiny_imagenet(path: Path, train: bool) -> Samples:
    """A split of Tiny ImageNet in its original layout: `train/<wnid>/images/*`, `val/images/*`, `val_annotations.txt`.

    path is the folder tiny-imagenet-200 or the one that it lies in. Raises UsageError if it is missing or unfit.
    """
    if not path.is_dir():
        raise UsageError(f"no Tiny ImageNet in {path}: unpack its archive there, or give --data_path FOLDER")
    path = path / FOLDER if (path / FOLDER).is_dir() else path
    if not (path / "val" / "val_annotations.txt").is_file():
        raise UsageError(f"no Tiny ImageNet in {path}: expected train/<wnid>/images and val/val_annotations.txt in it")
    if not (path / "train").is_dir():
        raise UsageError(f"no folder train in {path}: its folders name the classes")
    classes = list_classes(path / "train")
    if not classes:
        raise UsageError(f"no class folders in {path / 'train'}: expected train/<wnid>/images")
    if train:
        return collect_samples(path / "train", _list_train(path / "train", classes), classes, path)
    label = {wnid: i for i, wnid in enumerate(classes)}
    lines = read_lines(path / "val" / "val_annotations.txt")
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
    return collect_samples(images, ((file, label[wnid]) for file, wnid in rows), classes, path)


def _list_train(folder: Path, classes: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    for label, wnid in enumerate(classes):
        below = folder / wnid / "images"
        files = sorted(file for file in os.listdir(below) if file[0] != ".") if below.is_dir() else []
        if not files:
            raise UsageError(f"no images in {below}")
        yield from ((f"{wnid}/images/{file}", label) for file in files)


TINY_IMAGENET = StreamSet(
    title="Tiny ImageNet",
    default_path=f"imagenet/data/{FOLDER}",
    read=list_tiny_imagenet,
    view=lambda size, train: Whole(size),
    augmentation=Augmentation(degrees=20.0),
    mean=(0.4802, 0.4481, 0.3975),
    std=(0.2302, 0.2265, 0.2262),
)
