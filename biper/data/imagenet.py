"""ImageNet (ILSVRC 2012): the archives that its owners give, unpacked to class folders, and how those are read."""

import hashlib
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from biper.data.crops import Centre, RandomArea, View
from biper.data.datasets import IMAGENET_SIZE, StreamSet
from biper.data.samples import WORDS, Samples, list_folder
from biper.data.stream import Augmentation
from biper.errors import UsageError

SITE = "image-net.org (an account is needed)"
SIZES = {"train": "138 GB", "val": "6.3 GB", "devkit": "2.5 MB"}  # of the archives, by torchvision's names for them
BLOCK = 1 << 24  # bytes
DONE, BEGUN = ".complete", ".unpacking"  # in the folder of a split: it is whole; it is ours
WNID = re.compile(r"n\d{8}")
SHORTER = 256  # of an image's sides in evaluation, of which the central 224 pixels are shown


def archive_name(kind: str) -> tuple[str, str]:
    """The file name and the MD5 sum of an archive: 'train', 'val' or 'devkit'."""
    from torchvision.datasets.imagenet import ARCHIVE_META  # here, as it takes as long to load as torch itself

    name, md5 = ARCHIVE_META[kind]
    return str(name), str(md5)


def prepare_imagenet(archives: Path, path: Path) -> None:
    """Unpack the archives in a folder into path/train and path/val, a folder for each class, and path/words.txt.

    What was unpacked before is left alone, so an interrupted call goes on where it was. Raises UsageError if an archive
    is missing or damaged, or the disk is full.
    """
    if not archives.is_dir():
        raise UsageError(f"no folder {archives}: --archives is where the downloaded .tar files lie; they are at {SITE}")
    wanted = [split for split in ("train", "val") if not (path / split / DONE).exists()]
    files = {kind: archives / archive_name(kind)[0] for kind in SIZES}
    missing = [kind for kind in wanted if not files[kind].is_file()]
    foreign = [path / split for split in wanted if (path / split).is_dir() and not (path / split / BEGUN).exists()]
    if foreign:
        raise UsageError(
            f"{foreign[0]} was not unpacked by this command: train on it as it is, or give another --data_path"
        )
    try:
        if (
            "val" in wanted
            and not files["devkit"].is_file()
            and ("val" in missing or not has_class_folders(files["val"]))
        ):
            missing.append("devkit")  # it says what the validation images show
        if missing:
            listed = ", ".join(f"{files[kind].name} ({SIZES[kind]})" for kind in missing)
            raise UsageError(f"not in {archives}: {listed}; download from {SITE} into the folder of --archives")
        path.mkdir(parents=True, exist_ok=True)
        for kind in (*wanted, "devkit"):
            if files[kind].is_file():
                require_md5(files[kind], archive_name(kind)[1], path / f".{files[kind].name}.checked")
        labels, words = read_devkit(files["devkit"]) if files["devkit"].is_file() else ([], {})
        if "train" in wanted:
            unpack_train(files["train"], path / "train")
        if "val" in wanted:
            unpack_val(files["val"], path / "val", labels)
        if words:
            (path / WORDS).write_text("".join(f"{wnid}\t{name}\n" for wnid, name in sorted(words.items())))
    except tarfile.TarError as error:
        raise UsageError(f"an archive in {archives} cannot be unpacked: {error}") from error
    except OSError as error:
        raise UsageError(f"cannot write to {path}: {error}; run the command again to go on") from error


def require_md5(file: Path, expected: str, note: Path) -> None:
    """Raise UsageError unless a file has that MD5 sum. The note tells the next call that it was checked."""
    about = f"{expected} {file.stat().st_size} {file.stat().st_mtime_ns}"
    if note.is_file() and note.read_text() == about:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("rb") as stream, _bar(f"checking {file.name}", file.stat().st_size) as bar:
        for block in iter(lambda: stream.read(BLOCK), b""):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != expected:
        raise UsageError(f"{file} is damaged: its MD5 is {digest.hexdigest()}, not {expected}; download it again")
    note.write_text(about)


def read_devkit(archive: Path) -> tuple[list[str], dict[str, str]]:
    """The class of every validation image, and the classes in words, from the development kit."""
    from torchvision.datasets.imagenet import load_meta_file, parse_devkit_archive

    with TemporaryDirectory() as folder:
        shutil.copy(archive, folder)
        parse_devkit_archive(folder)
        words, labels = load_meta_file(folder)
    return list(labels), {wnid: ", ".join(names) for wnid, names in words.items()}


def unpack_train(archive: Path, folder: Path) -> None:
    """An archive of archives, one a class, to folder/<class>/*. A class is there whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BEGUN).touch()
    with _reading(archive) as (tar, bar):
        for member in tar:
            if member.isfile() and not (folder / Path(member.name).stem).is_dir():
                inner = tar.extractfile(member)
                assert inner is not None  # it is a file
                with inner, tarfile.open(fileobj=inner) as images, _whole(folder / Path(member.name).stem) as temporary:
                    for image in images:
                        _copy(images, image, temporary)
            bar.update(tar.offset - bar.n)
    (folder / DONE).touch()


def unpack_val(archive: Path, folder: Path, labels: list[str]) -> None:
    """The validation images, to folder/<class>/*. labels: the classes in the order of the images' names.

    An archive that has class folders needs no labels.
    """
    with _whole(folder) as temporary, _reading(archive) as (tar, bar):
        members = sorted((member for member in tar if member.isfile()), key=lambda member: Path(member.name).name)
        parents = [Path(member.name).parent.name for member in members]
        classes = parents if all(WNID.fullmatch(name) for name in parents) else labels
        if len(members) != len(classes):
            raise UsageError(f"{archive} has {len(members)} images, the development kit has {len(classes)} labels")
        for member, wnid in zip(members, classes, strict=True):
            (temporary / wnid).mkdir(exist_ok=True)
            _copy(tar, member, temporary / wnid)
            bar.update(max(0, member.offset_data + member.size - bar.n))
    (folder / DONE).touch()


def has_class_folders(archive: Path) -> bool:
    """Whether the first file in an archive lies in a folder that is named after a class."""
    with tarfile.open(archive) as tar:
        first = next((member for member in tar if member.isfile()), None)
        return first is not None and bool(WNID.fullmatch(Path(first.name).parent.name))


def _copy(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    if member.islnk() or member.issym():  # tarfile would look for what they point to
        raise UsageError(f"{member.name} in its archive is a link, not an image: download it again")
    source = tar.extractfile(member)
    if source is not None:
        with source, (folder / Path(member.name).name).open("wb") as file:  # its name alone: never outside the folder
            shutil.copyfileobj(source, file)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name of `folder` once it is complete; one left by a killed call is emptied."""
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


@contextmanager
def _reading(archive: Path) -> Iterator[tuple[tarfile.TarFile, Any]]:
    with (
        archive.open("rb") as stream,
        _bar(f"unpacking {archive.name}", archive.stat().st_size) as bar,
        tarfile.open(fileobj=stream) as tar,
    ):
        yield tar, bar


def _bar(title: str, size: int) -> Any:  # noqa: ANN401  (tqdm is generic for its type checkers alone)
    return tqdm(desc=title, total=size, unit="B", unit_scale=True, disable=None)


def list_imagenet(path: Path, train: bool) -> Samples:
    """A split, as `prepare_imagenet` leaves it: `train/<wnid>/*` and `val/<wnid>/*`. Raises UsageError if missing."""
    if not path.is_dir():
        text = "unpack its archives by `biper prepare` (the repository's imagenet/dataset/README.md says how)"
        raise UsageError(f"no ImageNet in {path}: {text}, or give --data_path FOLDER")
    return list_folder(path, train)


def choose_view(size: int, train: bool) -> View:
    """Training: a random area. Evaluation: the shorter side at 256/224 of the size, then the centre."""
    return RandomArea(size) if train else Centre(size, round(size * SHORTER / IMAGENET_SIZE))


IMAGENET = StreamSet(
    title="ImageNet",
    default_path="imagenet/data/ImageNet",
    read=list_imagenet,
    view=choose_view,
    augmentation=Augmentation(lighting=0.1),
)
FOLDER = replace(IMAGENET, title="a folder of images", default_path="", read=list_folder)
