"""The loaders of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from biper.data.crops import cut
from biper.data.dali import DaliReader, has_dali
from biper.data.datasets import (
    FLIPS,
    IMAGENET_SIZE,
    PADDINGS,
    DataSettings,
    MemorySet,
    StreamSet,
    find_dataset,
    find_folder,
)
from biper.data.folder import fit, open_image
from biper.data.memory import Images, MemoryLoader, RandomCrop
from biper.data.pillow import PillowReader, Reader, Source
from biper.data.samples import Samples
from biper.data.sharding import ALONE, Loader, Order, Shard, smallest_share
from biper.data.stream import StreamLoader
from biper.data.validation import Split, hold_out
from biper.errors import UsageError
from biper.models.metadata import Metadata

__all__ = ["Loader", "Loaders", "Shard", "build_loaders", "has_dali", "require_same_classes", "view_image"]


@dataclass(frozen=True)
class Loaders:
    """What a run reads, and what its checkpoint must say about it. `train` is absent in evaluation."""

    test: Loader
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    train: Loader | None = None

    @property
    def in_memory(self) -> bool:
        """Whether the images are held on the device."""
        return isinstance(self.test, MemoryLoader)


@dataclass(frozen=True)
class Place:
    """Where batches are wanted and by whom, and how they are normalized."""

    device: torch.device
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shard: Shard
    replicas: int


def require_same_classes(metadata: Metadata, loaders: Loaders) -> None:
    """Raise UsageError if the data have other classes than a network was made for."""
    m = metadata
    if m.num_classes != len(loaders.classes) or (m.classes and m.classes != loaders.classes):
        trained = f"{m.num_classes} classes {', '.join(m.classes[:3])}..." if m.classes else f"{m.num_classes} classes"
        found = f"{len(loaders.classes)} classes {', '.join(loaders.classes[:3])}..."
        raise UsageError(f"the checkpoint has {trained}, the data have {found}: give its own --dataset and --data_path")


def build_loaders(
    settings: DataSettings,
    device: torch.device,
    *,
    replicas: int = 1,
    shard: Shard = ALONE,
    train: bool = True,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> Loaders:
    """The loaders of a run, test images only unless `train`; held-out training images if there is a validation split.

    replicas: GPUs among which DataParallel divides a batch; shard: this process's place among those that share it;
    mean, std: a checkpoint's normalization, else the data set's. Raises UsageError if the data are missing or unfit.
    """
    if train and settings.batch_size % shard.size:
        raise UsageError(
            f"-b {settings.batch_size} cannot be divided among {shard.size} processes: give a multiple of them"
        )
    if train and smallest_share(settings.batch_size, replicas, shard.size) < 2:
        shares = f"{replicas} GPUs" if shard.size == 1 else f"{shard.size} processes"
        raise UsageError(f"-b {settings.batch_size} over {shares} leaves one a single image: batch norm needs two")
    data = find_dataset(settings.dataset, settings.family)
    path = find_folder(data, settings)
    place = Place(device, mean or data.mean, std or data.std, shard, replicas)
    if isinstance(data, StreamSet):
        samples = _splits(lambda training: data.read(path, training), settings, train)
        loaders = _streamed(data, settings, place, samples)
    else:
        images = _splits(lambda training: data.read(path, training, settings), settings, train)
        loaders = _in_memory(data, settings, place, images)
    if loaders.train is not None and not loaders.train.count:
        raise UsageError(f"too few training images in {path}: batch norm needs two for each GPU or process")
    return loaders


def _splits(read: Callable[[bool], Split], settings: DataSettings, train: bool) -> Sequence[Split]:
    """The test images, then the training images if wanted. With a validation split the test images are not read."""
    if settings.validation:
        return hold_out(read(True), settings.validation, settings.seed)[: 1 + train]
    return (read(False), read(True)) if train else (read(False),)


def _in_memory(data: MemorySet, settings: DataSettings, place: Place, splits: Sequence[Images]) -> Loaders:
    side, width = splits[0].pixels.shape[1:3]
    if side != width:
        raise UsageError(f"the images in {settings.data_path} are {width}x{side}, not square: give --image_size N")
    if splits[-1].pixels.shape[1:] != splits[0].pixels.shape[1:]:
        raise UsageError(f"training and test images in {settings.data_path} differ in size: give --image_size N")
    s, p = settings, place
    if s.cutout > side:
        raise UsageError(f"--cutout {s.cutout} is larger than the images, {side}x{side}")
    padding, alternating, reflect = round(side * data.padding), s.flip == "alternating", s.padding == "reflect"
    augmentation = RandomCrop(padding, data.flip, alternating, reflect, s.cutout)
    test, *train = (
        MemoryLoader(
            images,
            batch_size=settings.batch_size if training else settings.batch_size_test,
            mean=p.mean,
            std=p.std,
            device=p.device,
            augmentation=augmentation if training else None,
            seed=settings.seed,
            replicas=p.replicas,
            shard=p.shard,
        )
        for training, images in enumerate(splits)
    )
    classes = splits[0].classes
    return Loaders(test, classes, classes, p.mean, p.std, side, train[0] if train else None)


def _streamed(data: StreamSet, settings: DataSettings, place: Place, splits: Sequence[Samples]) -> Loaders:
    if (settings.flip, settings.padding, settings.cutout) != (FLIPS[0], PADDINGS[0], 0):
        text = "--flip, --padding and --cutout are for data that are held in memory"
        raise UsageError(f"{text}: {data.title} is read from files batch by batch")
    size = settings.image_size or data.fixed_size or IMAGENET_SIZE
    p = place

    def loader(samples: Samples, training: bool) -> StreamLoader:
        batch = settings.batch_size if training else settings.batch_size_test
        source = Source(samples, data.view(size, training), settings.seed, replace=training)
        reader: Reader
        if settings.use_dali:
            reader = DaliReader(source, settings.workers, p.device, -(-batch // p.shard.size))
        else:
            reader = PillowReader(source, settings.workers, pin_memory=p.device.type == "cuda")
        order = Order(len(samples), batch, training, settings.seed, p.shard, p.replicas)
        augmentation = data.augmentation if training else None
        return StreamLoader(reader, order, mean=p.mean, std=p.std, device=p.device, augmentation=augmentation)

    test, *train = (loader(samples, bool(training)) for training, samples in enumerate(splits))
    s = splits[0]
    return Loaders(test, s.classes, s.names, p.mean, p.std, size, train[0] if train else None)


def view_image(file: Path, data: MemorySet | StreamSet, size: int) -> np.ndarray:
    """One image as evaluation on a data set shows it, (size, size, 3) uint8.

    Images of memory's data sets have one size: another's shorter side is resized to it, and its centre cut out. A
    photograph is turned as its camera says (EXIF), which torchvision's loader, and so training, leaves out. Raises
    UsageError naming an image that cannot be read.
    """
    image = open_image(file, turned=True)
    if isinstance(data, MemorySet):
        return np.asarray(fit(image, size))
    return cut(image, data.view(size, False).window(image.width, image.height, np.random.default_rng(0)))
