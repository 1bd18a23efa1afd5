"""Images that live on the device as one uint8 tensor, and are shuffled, augmented and normalized there in batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """pixels: (N, H, W, 3) uint8; labels: (N,) int64, places in `classes`."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Augmentation:
    """Random crop of the image's own size after zero padding by `padding` pixels a side, then a flip half the time.

    The distribution of torchvision's RandomCrop(size, padding) and RandomHorizontalFlip.
    """

    padding: int
    flip: bool


def smallest_share(batch: int, replicas: int) -> int:
    """Images that the last GPU gets when DataParallel divides a batch among `replicas`."""
    share = -(-batch // replicas)
    return batch - share * ((batch - 1) // share)


class MemoryLoader:
    """Batches (images (B, 3, H, W) float32 normalized, labels (B,)) on the device, without a host round trip.

    With an augmentation it is a training loader: every epoch has its own order and crops, a function of seed and
    epoch alone, and a last batch that leaves one of `replicas` GPUs a single image is left out: batch norm needs two.
    Without one it gives every image once, in order.
    """

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        replicas: int = 1,
    ) -> None:
        self.size = tuple(images.pixels.shape[1:3])
        self.labels = images.labels.to(device)
        self.mean = torch.tensor(mean, device=device) * 255  # (3,), of pixels in 0..255
        self.std = torch.tensor(std, device=device) * 255
        self.augmentation = augmentation
        self.seed = seed
        pad = augmentation.padding if augmentation else 0
        self.pixels = F.pad(images.pixels, (0, 0, pad, pad, pad, pad)).to(device)  # once: crops read from here
        count = len(images.labels)
        last = count % batch_size
        drop = augmentation is not None and last > 0 and smallest_share(last, replicas) < 2
        self.count = count - last if drop else count
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def epoch(self, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch."""
        device = self.labels.device
        generator = torch.Generator(device)
        # SeedSequence keeps (seed 0, epoch 1) apart from (seed 1, epoch 0)
        generator.manual_seed(int(np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)[0] >> 1))
        total = len(self.labels)
        order = torch.arange(total, device=device)
        if self.augmentation:
            order = torch.randperm(total, device=device, generator=generator)
        for chosen in order[: self.count].split(self.batch_size):
            pixels = self._crop(chosen, generator) if self.augmentation else self.pixels[chosen]
            images = (pixels.float() - self.mean) / self.std  # (B, H, W, 3)
            yield images.permute(0, 3, 1, 2).contiguous(), self.labels[chosen]

    def _crop(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Crops and flips of the chosen images (B,) in one gather: (B, H, W, 3) uint8."""
        assert self.augmentation is not None
        height, width = self.size
        device, batch = chosen.device, len(chosen)
        corner = torch.randint(2 * self.augmentation.padding + 1, (2, batch, 1), device=device, generator=generator)
        rows = corner[0] + torch.arange(height, device=device)  # (B, H)
        columns = torch.arange(width, device=device).expand(batch, width)
        if self.augmentation.flip:
            flipped = torch.rand((batch, 1), device=device, generator=generator) < 0.5
            columns = torch.where(flipped, columns.flip(1), columns)
        columns = corner[1] + columns  # (B, W)
        return self.pixels[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
