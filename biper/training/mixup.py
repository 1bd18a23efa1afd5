"""MixUp: batches of weighted means of two images each, with the same means of their labels."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from biper.data.sharding import make_generator


@dataclass(frozen=True)
class MixUp:
    """Mixes each batch with a permutation of itself. [Zhang et al. 2017, mixup, arXiv 1710.09412]

    alpha: of the Beta distribution of the weight, one a batch. What is drawn follows from seed, epoch and step.
    """

    alpha: float
    classes: int
    seed: int

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W), labels (B,) -> images of the same shape, probabilities (B, classes)."""
        random = make_generator(self.seed, epoch, step)
        weight = float(random.beta(self.alpha, self.alpha))
        others = torch.from_numpy(random.permutation(len(labels))).to(images.device)
        targets = F.one_hot(labels, self.classes).to(images.dtype)
        return torch.lerp(images[others], images, weight), torch.lerp(targets[others], targets, weight)
