"""What a network sees in images: its likeliest classes, with probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from biper.data.datasets import DATASETS, find_dataset
from biper.data.folder import without_warnings
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


@name_out_of_memory()
@torch.inference_mode()
def predict(network: Network | PackedNetwork, images: Sequence[Path]) -> list[list[Guess]]:
    """For each image file the five likeliest classes, the first first; images are shown as in evaluation.

    Raises UsageError for an image that cannot be read, or a network that does not know how its images look, or gives
    logits that are not finite.
    """
    m = network.metadata
    if m is None or not (m.mean and m.std):
        raise UsageError("this network does not say how its images are normalized: it was not trained, or not by biper")
    if m.dataset not in DATASETS:
        raise UsageError(f"the data set {m.dataset!r} of this network is not known: its images cannot be shown alike")
    data = find_dataset(m.dataset, m.family)
    with without_warnings():
        pixels = [torch.from_numpy(view_image(image, data, m.shown_size).copy()) for image in images]
    mean, std = torch.tensor(m.mean) * 255, torch.tensor(m.std) * 255  # as the loaders have them
    names = m.class_names or m.classes or tuple(map(str, range(m.num_classes)))
    guesses = []
    for file, image in zip(images, pixels, strict=True):  # (S, S, 3) uint8
        x = ((image.float() - mean) / std).permute(2, 0, 1)[None]
        logits = network(x)[0]
        if not bool(logits.isfinite().all()):
            raise UsageError(f"the network's logits for {file} are not finite: its weights are not those of a training")
        best = logits.softmax(0).topk(min(TOP, m.num_classes))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        guesses.append([Guess(names[label], probability) for label, probability in pairs])
    return guesses
