"""Images that live on the device as one uint8 tensor, and are shuffled, augmented and normalized there in batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from biper.data.sharding import ALONE, Order, Shard


@dataclass(frozen=True)
class Images:
    """pixels: (N, H, W, 3) uint8; labels: (N,) int64, places in `classes`."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class RandomCrop:
    """Random crop of the image's own size after zero padding by `padding` pixels a side, then a flip half the time.

    The distribution of torchvision's RandomCrop(size, padding) and RandomHorizontalFlip.
    """

    padding: int
    flip: bool


class MemoryLoader:
    """Batches (images (B, 3, H, W) float32 normalized, labels (B,)) on the device, without a host round trip.

    A Loader. With an augmentation it trains: every epoch has its own order and crops, a function of seed and epoch
    alone. Without one it gives every image once, in order.
    """

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        augmentation: RandomCrop | None = None,
        seed: int = 0,
        replicas: int = 1,
        shard: Shard = ALONE,
    ) -> None:
        self.device, self.replaced = device, 0
        self.size = tuple(images.pixels.shape[1:3])
        self.labels = images.labels.to(device)
        self.mean = torch.tensor(mean, device=device) * 255  # (3,), of pixels in 0..255
        self.std = torch.tensor(std, device=device) * 255
        self.augmentation = augmentation
        pad = augmentation.padding if augmentation else 0
        self.pixels = F.pad(images.pixels, (0, 0, pad, pad, pad, pad)).to(device)  # once: crops read from here
        shuffled = augmentation is not None
        self.order = Order(len(images.labels), batch_size, shuffled, seed, shard, replicas)
        self.count = self.order.count

    def __len__(self) -> int:
        return len(self.order)

    def weight(self, step: int) -> float:
        """As `Loader.weight`."""
        return self.order.weight(step)

    def epoch(self, epoch: int = 0, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's batches of an epoch from a step on."""
        generator = torch.Generator(self.device)
        # SeedSequence keeps (seed 0, epoch 1) apart from (seed 1, epoch 0)
        keys = np.random.SeedSequence((self.order.seed, epoch)).generate_state(1, np.uint64)
        generator.manual_seed(int(keys[0] >> 1))
        total = self.order.total
        order = torch.arange(total, device=self.device)
        if self.augmentation:
            order = torch.randperm(total, device=self.device, generator=generator)
        for step, chosen in enumerate(order[: self.count].split(self.order.batch_size)):
            place = self._draw(len(chosen), generator)  # for all processes, and for steps that are passed over
            part = self.order.part(step)
            if step < first_step or part.start == part.stop:
                continue
            mine = chosen[part]
            pixels = self._crop(mine, *(x[part] for x in place)) if place else self.pixels[mine]
            images = (pixels.float() - self.mean) / self.std  # (B, H, W, 3)
            yield images.permute(0, 3, 1, 2).contiguous(), self.labels[mine]

    def _draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Corners of the crops, row and column (B, 1) each, and whether to flip (B, 1); () without augmentation."""
        a = self.augmentation
        if a is None:
            return ()
        corner = torch.randint(2 * a.padding + 1, (2, batch, 1), device=self.device, generator=generator)
        flip = corner.new_zeros((batch, 1), dtype=torch.bool)
        if a.flip:
            flip = torch.rand((batch, 1), device=self.device, generator=generator) < 0.5
        return corner[0], corner[1], flip

    def _crop(self, chosen: Tensor, row: Tensor, column: Tensor, flip: Tensor) -> Tensor:
        """Crops and flips of the chosen images (B,) in one gather: (B, H, W, 3) uint8."""
        height, width = self.size
        rows = row + torch.arange(height, device=self.device)  # (B, H)
        columns = torch.arange(width, device=self.device).expand(len(chosen), width)
        columns = column + torch.where(flip, columns.flip(1), columns)  # (B, W)
        return self.pixels[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
