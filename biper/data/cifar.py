"""CIFAR-10 and CIFAR-100 in the files whose names and checksums torchvision knows."""

import logging
import pickle
import posixpath
import shlex
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5, download_url

from biper.data.datasets import MemorySet
from biper.data.memory import Images
from biper.errors import UsageError, one_line, told
from biper.files import atomically

log = logging.getLogger("biper")

READERS: dict[str, type[datasets.CIFAR10]] = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
ARRAYS = (  # what pickled arrays are made of, by NumPy before and after 2.0
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
)
Listed = Sequence[tuple[str, str]]  # files with their published MD5


class PlainUnpickler(pickle.Unpickler):
    """Reads texts, numbers and arrays alone: no code runs, whoever wrote the file."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        """One of ARRAYS. Raises UnpicklingError for anything else."""
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return super().find_class(module, name)


def read_cifar(name: str, path: Path, train: bool, accept: bool = False) -> Images:
    """The training or test images of 'cifar10' or 'cifar100'.

    accept: also from files that are not the published ones, which a line of the log names. Raises UsageError if files
    are missing, damaged, or others.
    """
    reader = READERS[name]
    folder, meta = path / reader.base_folder, reader.meta
    files: Listed = [(file, md5) for file, md5 in (reader.train_list if train else reader.test_list)]
    _require_published(name, path, [*files, (meta["filename"], meta["md5"])], accept)
    classes = _classes(folder / meta["filename"], meta["key"])
    parts = [_part(folder / file, len(classes)) for file, _ in files]
    pixels = np.concatenate([data for data, _ in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = [label for _, labels in parts for label in labels]
    return Images(torch.from_numpy(np.ascontiguousarray(pixels)), torch.tensor(labels), classes)


def _load(file: Path) -> Any:  # noqa: ANN401
    try:
        with file.open("rb") as opened:
            return PlainUnpickler(opened, encoding="latin1").load()
    except Exception as error:  # pickle promises no kind
        raise UsageError(f"{file} is damaged: {told(error)}") from error


def _classes(file: Path, key: str) -> tuple[str, ...]:
    contents = _load(file)
    names = contents.get(key) if isinstance(contents, dict) else None
    if not names or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{file} is no file of CIFAR: expected the classes as {key}")
    return tuple(names)


def _part(file: Path, classes: int) -> tuple[np.ndarray, list[int]]:
    """Pixels (N, 3072) uint8, red, green, then blue, and N labels."""
    contents = _load(file)
    try:
        data, labels = contents["data"], contents["labels" if "labels" in contents else "fine_labels"]
        fit = data.dtype == np.uint8 and data.shape == (len(labels), 3072)
        fit = fit and all(type(label) is int and 0 <= label < classes for label in labels)
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no file of CIFAR: {told(error)}") from error
    if not fit:
        raise UsageError(f"{file} is no file of CIFAR: expected N x 3072 bytes, and N labels below {classes}")
    return data, labels


def _published_files(name: str) -> Listed:
    reader = READERS[name]
    listed = [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]
    return [(file, md5) for file, md5 in listed]


def _others(folder: Path, files: Listed) -> dict[str, str]:
    """What is wrong with which of the files, the missing ones first."""
    missing = {file: f"{file} is missing" for file, _ in files if not (folder / file).is_file()}
    found = {file: calculate_md5(str(folder / file)) for file, _ in files if file not in missing}
    return missing | {
        file: f"{file} has the MD5 {found[file]}, not {md5}" for file, md5 in files if found.get(file, md5) != md5
    }


def _require_published(name: str, path: Path, files: Listed, accept: bool) -> None:
    folder = path / READERS[name].base_folder
    wrong = _others(folder, files)
    there = all((folder / file).is_file() for file in wrong)
    if wrong and there and accept:
        text = "; ".join(wrong.values())
        log.warning("%s in %s is not the published one, and is used all the same: %s", name, path, text)
    elif wrong:
        download = shlex.join(["biper", "download", "--dataset", name, "--data_path", str(path)])
        first, *more = wrong.values()
        text = f"{first}, and {len(more)} more" if more else first
        accepting = "; to use it all the same: --accept_checksums" if there else ""
        images = "; for images in folders of classes: --dataset folder" if (path / "train").is_dir() else ""
        raise UsageError(f"no intact {name} in {path}: {text}; to get it: {download}{accepting}{images}")


def fetch_cifar(name: str, path: Path, archive: Path | None = None, accept: bool = False) -> None:
    """Download and unpack into path, or unpack a local archive. Raises UsageError if that fails.

    accept: also an archive that is not the published one.
    """
    reader = READERS[name]
    try:
        if archive is None:
            if not _others(path / reader.base_folder, _published_files(name)):
                return
            download_url(reader.url, str(path), reader.filename, reader.tgz_md5)
            archive = path / reader.filename
        elif not archive.is_file():
            raise UsageError(f"no archive at {archive}")
        elif (found := calculate_md5(str(archive))) != reader.tgz_md5:
            text = f"{archive} is not the original {reader.filename}: its MD5 is {found}, not {reader.tgz_md5}"
            if not accept:
                raise UsageError(f"{text}; to use it all the same: --accept_checksums")
            log.warning("%s; it is used all the same", text)
        _unpack(archive, name, path)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        other = f"with {reader.filename} on disk, use --archive; with folders of images, train with --dataset folder"
        raise UsageError(f"cannot get {name} into {path}: {error}; {other}") from error
    read_cifar(name, path, train=False, accept=accept)


def _unpack(archive: Path, name: str, path: Path) -> None:
    """The data set's own files, by their names. Whatever else an archive holds, wherever it would go, stays in it.

    So no filter of tarfile is needed, which not all versions of Python have. Raises UsageError before anything is
    written if a file is not there.
    """
    reader = READERS[name]
    try:
        with tarfile.open(archive) as tar:
            members = {posixpath.normpath(member.name): member for member in tar if member.isfile()}
            wanted = [f"{reader.base_folder}/{file}" for file, _ in _published_files(name)]
            missing = [file for file in wanted if file not in members]
            if missing:
                raise UsageError(f"{archive} holds no file {missing[0]}: it is no {reader.filename}")
            (path / reader.base_folder).mkdir(parents=True, exist_ok=True)
            for file in sorted(wanted, key=lambda file: members[file].offset):
                source = tar.extractfile(members[file])
                assert source is not None  # a regular file
                with atomically(path / file) as temporary, temporary.open("wb") as target:
                    shutil.copyfileobj(source, target)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UsageError(f"{archive} is damaged or no archive: {one_line(error).rstrip(':')}") from error


CIFAR10 = MemorySet(  # normalized with ImageNet's mean and standard deviation, as published
    title="CIFAR-10",
    default_path="cifar10/data/CIFAR10",
    fixed_size=32,
    read=lambda path, train, settings: read_cifar("cifar10", path, train, settings.accept_checksums),
)
CIFAR100 = MemorySet(
    title="CIFAR-100",
    default_path="cifar10/data/CIFAR100",
    fixed_size=32,
    read=lambda path, train, settings: read_cifar("cifar100", path, train, settings.accept_checksums),
    mean=(0.507, 0.487, 0.441),
    std=(0.267, 0.256, 0.276),
)
