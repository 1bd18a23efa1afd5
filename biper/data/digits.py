"""scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels that need no download."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from biper.data.datasets import MemorySet
from biper.data.memory import Images

ORDER = Path(__file__).with_name("digits_order.txt")  # numbers of all images, drawn once, stratified
TRAINING = 1437  # so many of them come first, then the test images
SIZE = 32  # at which they are shown unless told otherwise


def read_digits(train: bool, image_size: int) -> Images:
    """1,437 training or 360 test images of image_size x image_size, three equal channels; a fixed stratified split."""
    images, labels = _read_all()
    order = [int(number) for number in ORDER.read_text().split()]
    chosen = order[:TRAINING] if train else order[TRAINING:]
    grey = torch.from_numpy(images[chosen]).float()[:, None] * (255 / 16)  # (N, 1, 8, 8), 0..255
    large = F.interpolate(grey, size=(image_size, image_size), mode="bilinear", align_corners=False)
    pixels = large.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    return Images(pixels.contiguous(), torch.from_numpy(labels[chosen]).long(), tuple("0123456789"))


def _read_all() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Images (1797, 8, 8) of numbers from 0 to 16, and labels (1797,), from scikit-learn's own file.

    Importing scikit-learn takes longer than an epoch on digits, and is left to where that file is not found.
    """
    package = find_spec("sklearn")
    folders = [] if package is None else package.submodule_search_locations or []
    for file in (Path(folder, "datasets", "data", "digits.csv.gz") for folder in folders):
        if file.is_file():
            rows = np.loadtxt(file, delimiter=",")
            return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


DIGITS = MemorySet(
    title="scikit-learn's digits",
    needs_folder=False,
    read=lambda path, train, settings: read_digits(train, settings.image_size or SIZE),
    mean=(0.305,) * 3,  # ours: measured on the 8x8 training images
    std=(0.376,) * 3,
    padding=1 / 16,
    flip=False,  # a mirrored 2 is no 2
)
