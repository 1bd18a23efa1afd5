"""Image folders, `train/<class>/*` and `test/<class>/*` or `val/<class>/*`, decoded once into memory."""

import os
import shlex
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from biper.data.datasets import MemorySet
from biper.data.memory import Images
from biper.errors import UsageError, reason, shown
from biper.kinds import is_line

LONGEST = 100  # of an image's sides, how many times as long as the other one
COPIES = 3  # at the peak: the decoded images, their padded copy, and the other split


def find_split(path: Path, train: bool) -> Path:
    """The folder of a split. Raises UsageError if it is not there."""
    names = ("train",) if train else ("test", "val")
    for name in names:
        if (path / name).is_dir():
            return path / name
    text = f"no folder {' or '.join(names)} in {path}: expected {names[0]}/<class>/<image>"
    if path.name in ("train", "test", "val") and any((path.parent / name).is_dir() for name in names):
        text += f"; did you mean --data_path {shlex.quote(str(path.parent))}?"
    raise UsageError(text)


def list_classes(folder: Path) -> tuple[str, ...]:
    """The names of the class folders, sorted: their places are the labels. Raises UsageError for what is no text."""
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))
    if odd := [name for name in names if not is_line(name)]:
        raise UsageError(
            f"{folder}: the class {shown(odd[0])} has a name that is no text of one line in UTF-8: rename it"
        )
    return names


def files_below(folder: Path) -> list[Path]:
    """The files in a folder and below it, sorted; neither hidden ones nor those in hidden folders.

    Links are followed, to each folder once, and to none that the folder itself lies in. Raises OSError for one that
    cannot be read.
    """

    def refuse(error: OSError) -> NoReturn:
        raise error

    found: list[Path] = []
    seen = {str(place) for place in Path(os.path.realpath(folder)).parents}
    for top, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        place = os.path.realpath(top)
        folders[:] = [] if place in seen else sorted(name for name in folders if name[0] != ".")
        found += [] if place in seen else [Path(top, name) for name in files if name[0] != "."]
        seen.add(place)
    return sorted(found)


def list_images(folder: Path, classes: tuple[str, ...]) -> Iterator[tuple[Path, int]]:
    """Every file below each class folder, see `files_below`, with its label."""
    for label, name in enumerate(classes):
        found = files_below(folder / name)
        if not found:
            raise UsageError(f"no images in {folder / name}")
        yield from ((file, label) for file in found)


def list_split(path: Path, train: bool) -> tuple[Path, tuple[str, ...], list[tuple[Path, int]]]:
    """The folder of a split, its classes, and its files with their labels.

    Raises UsageError if there are none, or if the test images have other classes than the training images.
    """
    folder = find_split(path, train)
    classes = list_classes(folder)
    other = path / "train"
    if not train and other.is_dir() and list_classes(other) != classes:
        odd = sorted(set(classes) ^ set(list_classes(other)))
        raise UsageError(f"{folder} and {other} hold other classes: {', '.join(odd[:5])} only in one of them")
    files = list(list_images(folder, classes))
    if not files:
        raise UsageError(f"no class folders in {folder}: expected {folder.name}/<class>/<image>")
    return folder, classes, files


@contextmanager
def without_warnings() -> Iterator[None]:
    """Context: Pillow says nothing of odd metadata in files that it reads. Not to be entered by several threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_image(file: str | Path | BinaryIO, turned: bool = False) -> Image.Image:
    """A whole image as RGB; turned: as its EXIF says. Raises UsageError saying what is wrong with one that is unfit.

    It is what torchvision's loader gives, whose alpha is dropped, but for 16 bits: they are divided by 256. What has
    more, or is no integer, is refused, as nobody knows what its white is; so is an image that is too long.
    """
    try:
        if isinstance(file, str | Path) and os.path.exists(file) and not os.path.isfile(file):
            raise UsageError("it is no file")  # a pipe would be waited for
        with Image.open(file) as opened:
            if max(opened.size) > LONGEST * min(opened.size):  # whose shorter side fitted would fill the memory
                raise UsageError(f"it has {opened.width:,} x {opened.height:,} pixels, more than {LONGEST} to 1")
            sixteen = opened.mode == "I" and opened.format == "PNG"  # as some versions of Pillow call it
            if sixteen or opened.mode.startswith("I;16"):  # which convert() would cut off at 255
                return Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)).convert("RGB")
            if opened.mode in ("I", "F"):
                raise ValueError(f"its pixels are 32-bit numbers (mode {opened.mode}): save it with 8 or 16 bits")
            image: Image.Image = opened.convert("RGB")
            return ImageOps.exif_transpose(image) if turned else image
    except Exception as error:  # decoders fail in their own ways
        raise UsageError(f"cannot read the image {file}: {reason(error)}") from error


def decode(file: Path, image_size: int | None) -> np.ndarray:
    """One image as (H, W, 3) uint8; with image_size its shorter side is resized to it and its centre cut out.

    Raises UsageError naming a file that cannot be read.
    """
    return np.asarray(fit(open_image(file), image_size))


def fit(image: Image.Image, image_size: int | None) -> Image.Image:
    """With image_size the shorter side is resized to it and the centre cut out."""
    if image_size is not None and image.size != (image_size, image_size):
        from torchvision.transforms import functional as TF  # here, as it takes as long to load as torch itself

        image = TF.center_crop(TF.resize(image, [image_size]), [image_size])
    return image


@without_warnings()
def read_folder(path: Path, train: bool, image_size: int | None, workers: int) -> Images:
    """Decode a split on `workers` threads, with a progress bar. Raises UsageError if the images differ in size."""
    folder, classes, files = list_split(path, train)
    first = decode(files[0][0], image_size)
    check_memory(folder, COPIES * len(files) * first.nbytes)
    pixels = torch.empty((len(files), *first.shape), dtype=torch.uint8)

    def fill(i: int) -> None:
        _put(pixels[i], decode(files[i][0], image_size), files[i][0])

    with ThreadPoolExecutor(max(1, workers)) as pool:
        done = pool.map(fill, range(len(files)))
        try:
            for _ in tqdm(done, f"decoding {folder.name}", total=len(files), unit="image", disable=None, leave=False):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the rest need not be decoded to report one bad file
            raise
    return Images(pixels, torch.tensor([label for _, label in files]), classes)


def _put(place: Tensor, image: np.ndarray, file: Path) -> None:
    if image.shape != tuple(place.shape):
        sizes = f"{image.shape[1]}x{image.shape[0]}, others {place.shape[1]}x{place.shape[0]}"
        raise UsageError(f"the images differ in size ({file} is {sizes}): give --image_size N")
    place.copy_(torch.from_numpy(image.copy()))


def check_memory(folder: Path, needed: int) -> None:
    """Raise UsageError before a data set fills more memory than the machine has."""
    if not hasattr(os, "sysconf"):
        return
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * total:
        sizes = f"{needed / 2**30:.0f} GiB in memory, the machine has {total / 2**30:.0f}"
        raise UsageError(f"the images of {folder} need {sizes}: give a smaller --image_size")


FOLDER = MemorySet(
    title="a folder of images",
    read=lambda path, train, settings: read_folder(path, train, settings.image_size, settings.workers),
)
