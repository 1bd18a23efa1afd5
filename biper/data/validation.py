"""A validation split: training images that are held out, for choices that the test images must not make."""

from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from biper.data.memory import Images
from biper.data.samples import Samples
from biper.errors import UsageError

Split = TypeVar("Split", Images, Samples)


def hold_out(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Of the training images `count` that are held out, then those that stay, both in their order.

    Each class gives its share, and which of its images follows from the seed. Raises UsageError if there are too few.
    """
    from sklearn.model_selection import train_test_split  # a second, which other runs need not wait

    labels = np.asarray(split.labels)
    try:
        stay, held = train_test_split(np.arange(len(labels)), test_size=count, random_state=seed, stratify=labels)
    except ValueError as error:
        text = f"--validation {count} of {len(labels):,} training images, {len(split.classes)} classes"
        raise UsageError(f"{text}: at least one of each class is held out, and one stays") from error
    return _chosen(split, np.sort(held)), _chosen(split, np.sort(stay))


def _chosen(split: Split, places: np.ndarray) -> Split:
    if isinstance(split, Samples):
        return replace(split, files=split.files[places], labels=split.labels[places])
    index = torch.from_numpy(places)
    return replace(split, pixels=split.pixels[index], labels=split.labels[index])
