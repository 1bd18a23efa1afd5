"""scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels that need no download."""

import torch
import torch.nn.functional as F

from biper.data.memory import Images

TEST_SHARE = 0.2


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
