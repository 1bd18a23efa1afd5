"""The data sets by name: how each is read, presented and augmented. One table for each kind of loader."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from biper.data import memory, stream
from biper.data.cifar import read_cifar
from biper.data.crops import Centre, RandomArea, View, Whole, cut
from biper.data.digits import read_digits
from biper.data.folder import decode, open_image, read_folder
from biper.data.memory import Images
from biper.data.samples import TINY, Samples, folder_samples, tiny_imagenet_samples
from biper.errors import UsageError

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_SIZE, IMAGENET_SHORTER = 224, 256


class DataSettings(Protocol):
    """What the data need to know of a run's settings."""

    @property
    def family(self) -> str:
        """Whose networks see the data."""

    @property
    def dataset(self) -> str:
        """The name of the data set."""

    @property
    def data_path(self) -> str:
        """Its folder; empty: where it lies by default."""

    @property
    def image_size(self) -> int | None:
        """The side at which images are shown; None: the data set's own."""

    @property
    def workers(self) -> int:
        """Processes or threads that decode images."""

    @property
    def use_dali(self) -> bool:
        """Whether DALI reads what is streamed."""

    @property
    def batch_size(self) -> int:
        """Images of a step of training, over all processes."""

    @property
    def batch_size_test(self) -> int:
        """Images of a step of evaluation, over all processes."""

    @property
    def seed(self) -> int:
        """What order and augmentation follow from."""


@dataclass(frozen=True)
class MemorySet:
    """A data set that is held on the device. read: (settings, path, train) -> Images."""

    read: Callable[[DataSettings, Path, bool], Images]
    mean: tuple[float, ...] = IMAGENET_MEAN  # published for CIFAR-10
    std: tuple[float, ...] = IMAGENET_STD
    padding: float = 1 / 8  # of the image's side: 4 pixels of 32
    flip: bool = True

    def augmentation(self, side: int) -> memory.Augmentation:
        """The augmentation of images of this size."""
        return memory.Augmentation(round(side * self.padding), self.flip)


@dataclass(frozen=True)
class StreamSet:
    """A data set that is read batch by batch. read: (path, train) -> Samples; view: (size, train) -> View."""

    read: Callable[[Path, bool], Samples]
    view: Callable[[int, bool], View]
    augmentation: stream.Augmentation
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


MEMORY_SETS = {
    "cifar10": MemorySet(lambda settings, path, train: read_cifar("cifar10", path, train)),
    "cifar100": MemorySet(
        lambda settings, path, train: read_cifar("cifar100", path, train), (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
    ),
    "folder": MemorySet(lambda settings, path, train: read_folder(path, train, settings.image_size, settings.workers)),
    "digits": MemorySet(
        lambda settings, path, train: read_digits(train, settings.image_size or 32),
        mean=(0.305,) * 3,  # ours: measured on the 8x8 training images
        std=(0.376,) * 3,
        padding=1 / 16,
        flip=False,  # a mirrored 2 is no 2
    ),
}


def imagenet_view(size: int, train: bool) -> View:
    """Training: a random area. Evaluation: the shorter side at 256/224 of the size, then the centre."""
    return RandomArea(size) if train else Centre(size, round(size * IMAGENET_SHORTER / IMAGENET_SIZE))


IMAGENET = StreamSet(folder_samples, imagenet_view, stream.Augmentation(lighting=0.1))
STREAM_SETS = {
    "imagenet": IMAGENET,
    "folder": IMAGENET,
    "tinyimagenet": StreamSet(
        tiny_imagenet_samples,
        lambda size, train: Whole(size),
        stream.Augmentation(degrees=20.0),
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2302, 0.2265, 0.2262),
    ),
}


def find_set(dataset: str, family: str) -> MemorySet | StreamSet:
    """A data set by name: folders are held in memory for CIFAR's networks and streamed for ImageNet's."""
    if dataset == "folder":
        return (STREAM_SETS if family == "imagenet" else MEMORY_SETS)["folder"]
    return STREAM_SETS.get(dataset) or MEMORY_SETS[dataset]


def shown(file: Path, data: MemorySet | StreamSet, size: int) -> np.ndarray:
    """One image as evaluation on a data set shows it, (size, size, 3) uint8.

    Images of memory's data sets have one size: another's shorter side is resized to it, and its centre cut out. Raises
    UsageError naming an image that cannot be read.
    """
    if isinstance(data, MemorySet):
        return decode(file, size)
    image = open_image(file)
    return cut(image, data.view(size, False).window(image.width, image.height, np.random.default_rng(0)))


def default_data_path(dataset: str) -> Path:
    """Where a data set lies unless told otherwise: where download.py and prepare.py put it."""
    streamed = {"imagenet": "ImageNet", "tinyimagenet": TINY}
    if dataset in streamed:
        return REPOSITORY / "imagenet" / "data" / streamed[dataset]
    return REPOSITORY / "cifar10" / "data" / dataset.upper()


def data_folder(settings: DataSettings) -> Path:
    """The folder of a run's data. Raises UsageError if there is none."""
    if settings.dataset == "digits":
        return Path()  # they come with scikit-learn
    if settings.dataset == "folder" and not settings.data_path:
        raise UsageError("--dataset folder needs --data_path FOLDER, with train/<class>/* and test/<class>/* in it")
    if settings.image_size and settings.dataset.startswith("cifar"):
        raise UsageError(f"--image_size is not for {settings.dataset}, which has 32x32 images")
    path = Path(settings.data_path) if settings.data_path else default_data_path(settings.dataset)
    if settings.data_path and not path.is_dir():
        raise UsageError(f"no data at {path}: --data_path is not a folder")
    if settings.dataset == "imagenet" and not path.is_dir():
        raise UsageError(f"no ImageNet in {path}: see imagenet/dataset/README.md, or give --data_path FOLDER")
    if settings.dataset == "tinyimagenet" and not path.is_dir():
        raise UsageError(f"no Tiny ImageNet in {path}: unpack its archive there, or give --data_path FOLDER")
    return path
