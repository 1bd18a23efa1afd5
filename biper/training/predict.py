"""What a network sees in images: its likeliest classes, with probabilities."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from biper.data.datasets import DATASETS, find_dataset
from biper.data.folder import files_below, without_warnings
from biper.data.loaders import view_image
from biper.errors import UsageError
from biper.models import Network
from biper.packed.network import PackedNetwork
from biper.training.process import name_out_of_memory

TOP = 5


@dataclass(frozen=True)
class Guess:
    """A class and its probability."""

    name: str
    probability: float


def predict(network: Network | PackedNetwork, images: Sequence[Path]) -> Iterator[list[Guess] | UsageError]:
    """For each image file the five likeliest classes, the first first; images are shown as in evaluation.

    An image that cannot be read gives the error that says so. Raises UsageError for a network that does not know how
    its images look, or gives logits that are not finite.
    """
    m = network.metadata
    if m is None or not (m.mean and m.std):
        raise UsageError(
            "this network does not say how its images are normalized: train it by biper train, which saves it"
        )
    if m.dataset not in DATASETS:
        raise UsageError(f"the data set {m.dataset!r} of this network is not known: its images cannot be shown alike")
    data = find_dataset(m.dataset, m.family)
    mean, std = torch.tensor(m.mean) * 255, torch.tensor(m.std) * 255  # as the loaders have them
    names = m.class_names or m.classes or tuple(map(str, range(m.num_classes)))
    for file in images:
        try:
            with without_warnings():
                pixels = torch.from_numpy(view_image(file, data, m.shown_size).copy())  # (S, S, 3) uint8
        except UsageError as error:
            yield error
            continue
        logits = _logits(network, ((pixels.float() - mean) / std).permute(2, 0, 1)[None])
        if not bool(logits.isfinite().all()):
            raise UsageError(f"the network's logits for {file} are not finite: its weights are not those of a training")
        best = logits.softmax(0).topk(min(TOP, m.num_classes))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        yield [Guess(names[label], probability) for label, probability in pairs]


@name_out_of_memory()
@torch.inference_mode()
def _logits(network: Network | PackedNetwork, x: torch.Tensor) -> torch.Tensor:
    """Of one image, (1, 3, S, S) -> (classes,)."""
    logits: torch.Tensor = network(x)[0]
    return logits


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files as they are given, and for a folder those in and below it with the name of an image, sorted.

    Raises UsageError for a folder without any, OSError for one that cannot be read.
    """
    endings, found = tuple(Image.registered_extensions()), []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = [file for file in files_below(path) if file.suffix.lower() in endings and file.is_file()]
        if not inside:
            raise UsageError(f"no images in {path}")
        found += inside
    return found
