"""The data sets by name, and what can be said of one before it is read.

A data set is a file of this folder, with its reader and its description, and a line in DATASETS. The descriptions
are imported on first use: the flags take their choices from here, and `--help` does not wait for torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from biper.errors import UsageError
from biper.places import REPOSITORY, data_home

if TYPE_CHECKING:
    from biper.data.crops import View
    from biper.data.memory import Images
    from biper.data.samples import Samples
    from biper.data.stream import Augmentation

DATASETS = {  # where each description is
    "cifar10": "biper.data.cifar:CIFAR10",
    "cifar100": "biper.data.cifar:CIFAR100",
    "digits": "biper.data.digits:DIGITS",
    "imagenet": "biper.data.imagenet:IMAGENET",
    "tinyimagenet": "biper.data.tiny_imagenet:TINY_IMAGENET",
    "folder": "biper.data.folder:FOLDER",
}
FOLDER = "folder"  # a way to read images: they may be a copy of a data set that has a name
STREAMED = {"folder": "biper.data.imagenet:FOLDER"}  # instead of those above, for ImageNet's networks

FLIPS, PADDINGS = ("random", "alternating"), ("zeros", "reflect")  # the first are what is published

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_SIZE = 224


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
    def accept_checksums(self) -> bool:
        """Whether files that are not the published ones may be read."""

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
    def validation(self) -> int:
        """How many training images are held out, and evaluated instead of the test images."""

    @property
    def flip(self) -> str:
        """One of FLIPS, where a data set's images are flipped."""

    @property
    def padding(self) -> str:
        """One of PADDINGS."""

    @property
    def cutout(self) -> int:
        """The side of the square that is hidden, in pixels; 0: none."""

    @property
    def seed(self) -> int:
        """What order and augmentation, and the validation split, follow from."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What every data set says of itself.

    title: what tables call it; default_path: where it lies in the repository unless told otherwise, empty if only the
    user can say; needs_folder: False if its images come with an installed package; fixed_size: the side of its images
    if they can be shown at no other, so that --image_size is refused; mean, std: per channel, for images in [0, 1].
    """

    title: str
    default_path: str = ""
    needs_folder: bool = True
    fixed_size: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


@dataclass(frozen=True, kw_only=True)
class MemorySet(Description):
    """A data set that is held on the device.

    read: (path, train, settings) -> Images; padding: of the random crop, as a share of the image's side; flip: half the
    time; family: whose networks train on it unless told otherwise.
    """

    read: "Callable[[Path, bool, DataSettings], Images]"
    padding: float = 1 / 8  # 4 pixels of 32
    flip: bool = True
    family: str = "cifar10"


@dataclass(frozen=True, kw_only=True)
class StreamSet(Description):
    """A data set that is read batch by batch.

    read: (path, train) -> Samples; view: (size, train) -> View; family: as a MemorySet's.
    """

    read: "Callable[[Path, bool], Samples]"
    view: "Callable[[int, bool], View]"
    augmentation: "Augmentation"
    family: str = "imagenet"


def find_dataset(name: str, family: str = "cifar10") -> MemorySet | StreamSet:
    """A data set's description; some have another form for ImageNet's networks. Raises UsageError if there is none."""
    if name not in DATASETS:
        raise UsageError(f"unknown data set {name!r}; choose from {', '.join(DATASETS)}")
    home = STREAMED.get(name, DATASETS[name]) if family == "imagenet" else DATASETS[name]
    module, attribute = home.split(":")
    description: MemorySet | StreamSet = getattr(import_module(module), attribute)
    return description


def default_data_path(name: str) -> Path:
    """Where a data set lies unless told otherwise, which is where download.py and prepare.py put it.

    In the environment variable BIPER_DATA a folder for each data set; without it, in a checkout of the repository, the
    folder that the data set's description names; elsewhere the same as in BIPER_DATA, in the user's data folder.
    """
    home = data_home()
    if home is None:
        assert REPOSITORY is not None
        return REPOSITORY / find_dataset(name).default_path
    return home / name


def find_folder(data: Description, settings: DataSettings) -> Path:
    """The folder of a run's data, which may not be there if it is the default one: the reader says how to get it.

    Raises UsageError if the settings do not fit the data.
    """
    if not data.needs_folder:
        return Path()
    if not data.default_path and not settings.data_path:
        text = "needs --data_path FOLDER, with train/<class>/* and test/<class>/* in it, or --dataset NAME"
        raise UsageError(f"--dataset {settings.dataset} {text}")
    if settings.image_size and data.fixed_size:
        size = f"{data.fixed_size}x{data.fixed_size}"
        raise UsageError(f"--image_size is not for {settings.dataset}, which has {size} images")
    path = Path(settings.data_path) if settings.data_path else default_data_path(settings.dataset)
    if settings.data_path and not path.is_dir():
        raise UsageError(f"no data at {path}: --data_path is not a folder")
    return path
