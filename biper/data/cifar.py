"""CIFAR-10 and CIFAR-100 as torchvision reads them, checksums verified."""

import shlex
import sys
from pathlib import Path

import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, extract_archive

from biper.data.datasets import MemorySet
from biper.data.memory import Images
from biper.errors import UsageError
from biper.places import REPOSITORY

DOWNLOAD = [str(REPOSITORY / "cifar10" / "dataset" / "download.py")] if REPOSITORY else ["-m", "biper", "download"]
READERS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


def read_cifar(name: str, path: Path, train: bool) -> Images:
    """The training or test images of 'cifar10' or 'cifar100'. Raises UsageError if missing or damaged."""
    try:
        data = READERS[name](str(path), train=train, download=False)
    except (RuntimeError, OSError) as error:
        download = shlex.join([sys.executable, *DOWNLOAD, "--dataset", name, "--data_path", str(path)])
        raise UsageError(f"no intact {name} in {path}; to get it: {download}") from error
    return Images(torch.from_numpy(data.data), torch.tensor(data.targets), tuple(data.classes))


def fetch_cifar(name: str, path: Path, archive: Path | None = None) -> None:
    """Download and unpack into path, or unpack a local archive. Raises UsageError if that fails."""
    reader = READERS[name]
    try:
        if archive is None:
            reader(str(path), download=True)
        elif not archive.is_file():
            raise UsageError(f"no archive at {archive}")
        elif not check_integrity(str(archive), reader.tgz_md5):
            raise UsageError(f"{archive} is not the original {reader.filename}: its MD5 is not {reader.tgz_md5}")
        else:
            path.mkdir(parents=True, exist_ok=True)
            extract_archive(str(archive), str(path))
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise UsageError(
            f"cannot get {name} into {path}: {error}; with {reader.filename} on disk, use --archive"
        ) from error
    read_cifar(name, path, train=False)


CIFAR10 = MemorySet(  # normalized with ImageNet's mean and standard deviation, as published
    title="CIFAR-10",
    default_path="cifar10/data/CIFAR10",
    fixed_size=32,
    read=lambda path, train, settings: read_cifar("cifar10", path, train),
)
CIFAR100 = MemorySet(
    title="CIFAR-100",
    default_path="cifar10/data/CIFAR100",
    fixed_size=32,
    read=lambda path, train, settings: read_cifar("cifar100", path, train),
    mean=(0.507, 0.487, 0.441),
    std=(0.267, 0.256, 0.276),
)
