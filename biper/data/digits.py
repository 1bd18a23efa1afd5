"""scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels that need no download."""

import torch
import torch.nn.functional as F

from biper.data.datasets import MemorySet
from biper.data.memory import Images

TEST_SHARE = 0.2
SIZE = 32  # at which they are shown unless told otherwise


def read_digits(train: bool, image_size: int) -> Images:
    """1,437 training or 360 test images of image_size x image_size, three equal channels; a fixed stratified split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train_set, test_set = train_test_split(
        range(len(digits.target)), test_size=TEST_SHARE, random_state=0, stratify=digits.target
    )
    chosen = train_set if train else test_set
    grey = torch.from_numpy(digits.images[chosen]).float()[:, None] * (255 / 16)  # (N, 1, 8, 8), 0..255
    large = F.interpolate(grey, size=(image_size, image_size), mode="bilinear", align_corners=False)
    pixels = large.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    return Images(pixels.contiguous(), torch.from_numpy(digits.target[chosen]).long(), tuple("0123456789"))


DIGITS = MemorySet(
    title="scikit-learn's digits",
    needs_folder=False,
    read=lambda path, train, settings: read_digits(train, settings.image_size or SIZE),
    mean=(0.305,) * 3,  # ours: measured on the 8x8 training images
    std=(0.376,) * 3,
    padding=1 / 16,
    flip=False,  # a mirrored 2 is no 2
)
