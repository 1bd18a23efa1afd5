"""Data sets by name, and the loaders of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from biper.config import Config
from biper.data.cifar import read_cifar
from biper.data.digits import read_digits
from biper.data.folder import read_folder
from biper.data.memory import Augmentation, Images, MemoryLoader, smallest_share
from biper.errors import UsageError
from biper.metadata import Metadata

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class DataSet:
    """How to read a split, (config, path, train) -> Images, and how to present it."""

    read: Callable[[Config, Path, bool], Images]
    mean: tuple[float, ...] = IMAGENET_MEAN  # published for CIFAR-10
    std: tuple[float, ...] = IMAGENET_STD
    padding: float = 1 / 8  # of the image's side: 4 pixels of 32
    flip: bool = True


DATASETS = {
    "cifar10": DataSet(lambda config, path, train: read_cifar("cifar10", path, train)),
    "cifar100": DataSet(
        lambda config, path, train: read_cifar("cifar100", path, train), (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
    ),
    "folder": DataSet(lambda config, path, train: read_folder(path, train, config.image_size, config.workers)),
    "digits": DataSet(
        lambda config, path, train: read_digits(train, config.image_size or 32),
        mean=(0.305,) * 3,  # ours: measured on the 8x8 training images
        std=(0.376,) * 3,
        padding=1 / 16,
        flip=False,  # a mirrored 2 is no 2
    ),
}


@dataclass(frozen=True)
class Loaders:
    """What a run reads, and what its checkpoint must say about it. `train` is absent in evaluation."""

    test: MemoryLoader
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    train: MemoryLoader | None = None


def require_same_classes(metadata: Metadata, loaders: Loaders) -> None:
    """Raise UsageError if the data have other classes than a network was made for."""
    m = metadata
    if m.num_classes != len(loaders.classes) or (m.classes and m.classes != loaders.classes):
        trained = f"{m.num_classes} classes {', '.join(m.classes[:3])}..." if m.classes else f"{m.num_classes} classes"
        found = f"{len(loaders.classes)} classes {', '.join(loaders.classes[:3])}..."
        raise UsageError(f"the checkpoint has {trained}, the data have {found}: give its own --dataset and --data_path")


def default_data_path(dataset: str) -> Path:
    """Where cifar10/dataset/download.py puts a data set unless told otherwise."""
    return REPOSITORY / "cifar10" / "data" / dataset.upper()


def build_loaders(
    config: Config,
    device: torch.device,
    *,
    replicas: int = 1,
    train: bool = True,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> Loaders:
    """The loaders of a run, test images only unless `train`.

    replicas: GPUs among which a batch is divided; mean, std: a checkpoint's normalization, else the data set's.

    Raises UsageError if the data are missing or unfit.
    """
    data = DATASETS[config.dataset]
    if config.image_size and config.dataset.startswith("cifar"):
        raise UsageError(f"--image_size is for --dataset folder and digits; {config.dataset} has 32x32 images")
    if config.dataset == "folder" and not config.data_path:
        raise UsageError("--dataset folder needs --data_path FOLDER, with train/<class>/* and test/<class>/* in it")
    if train and smallest_share(config.batch_size, replicas) < 2:
        raise UsageError(f"-b {config.batch_size} over {replicas} GPUs leaves one a single image: batch norm needs two")
    path = Path(config.data_path) if config.data_path else default_data_path(config.dataset)
    if config.data_path and config.dataset != "digits" and not path.is_dir():
        raise UsageError(f"no data at {path}: --data_path is not a folder")
    test_images = data.read(config, path, False)
    mean, std = mean or data.mean, std or data.std
    side, width = test_images.pixels.shape[1:3]
    if side != width:
        raise UsageError(f"the images in {path} are {width}x{side}, not square: give --image_size N")
    loader = partial(MemoryLoader, mean=mean, std=std, device=device)
    test = loader(test_images, batch_size=config.batch_size_test)
    train_loader = None
    if train:
        train_images = data.read(config, path, True)
        if train_images.pixels.shape[1:] != test_images.pixels.shape[1:]:
            raise UsageError(f"training and test images in {path} differ in size: give --image_size N")
        train_loader = loader(
            train_images,
            batch_size=config.batch_size,
            augmentation=Augmentation(round(side * data.padding), data.flip),
            seed=config.seed,
            replicas=replicas,
        )
        if not train_loader.count:
            raise UsageError(f"too few training images in {path}: batch norm needs two a GPU")
    return Loaders(test, test_images.classes, mean, std, side, train_loader)
