"""Images that live on the device as one uint8 tensor, and are shuffled, augmented and normalized there in batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from biper.data.sharding import ALONE, Order, Shard, make_generator

FIRST_FLIPS = 2**32 - 1  # in the place of an epoch's number, of which there are fewer


@dataclass(frozen=True)
class Images:
    """pixels: (N, H, W, 3) uint8; labels: (N,) int64, places in `classes`."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class RandomCrop:
    """Random crop of the image's own size after zero padding by `padding` pixels a side, then a flip half the time.

    The distribution of torchvision's RandomCrop(size, padding) and RandomHorizontalFlip. alternating: instead each
    image is flipped in every other epoch, half of them in the first; reflect: the padding mirrors the image; cutout:
    the side of a square that is hidden, whose centre is any pixel. [DeVries and Taylor 2017, Cutout, arXiv 1708.04552]
    """

    padding: int
    flip: bool
    alternating: bool = False
    reflect: bool = False
    cutout: int = 0


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
        self.pixels = _padded(images.pixels, augmentation).to(device)  # once: crops read from here
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
        first = self._first_flips()
        order = torch.arange(total, device=self.device)
        if self.augmentation:
            order = torch.randperm(total, device=self.device, generator=generator)
        for step, chosen in enumerate(order[: self.count].split(self.order.batch_size)):
            # for all processes, and for steps that are passed over
            place, hidden = self._draw(chosen, first, epoch, generator), self._draw_hidden(len(chosen), generator)
            part = self.order.part(step)
            if step < first_step or part.start == part.stop:
                continue
            mine = chosen[part]
            pixels = self._crop(mine, *(x[part] for x in place)) if place else self.pixels[mine]
            images = (pixels.float() - self.mean) / self.std  # (B, H, W, 3)
            if hidden:
                images[self._square(*(x[part] for x in hidden))] = 0.0  # the mean of the data
            yield images.permute(0, 3, 1, 2).contiguous(), self.labels[mine]

    def _first_flips(self) -> Tensor:
        """Whether an image is flipped in the first epoch (N,), if flips alternate; a function of the seed."""
        random = make_generator(self.order.seed, FIRST_FLIPS)
        count = self.order.total if self.augmentation and self.augmentation.alternating else 0
        return torch.from_numpy(random.random(count) < 0.5).to(self.device)

    def _draw(self, chosen: Tensor, first: Tensor, epoch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Corners of the crops, row and column (B, 1) each, and whether to flip (B, 1); () without augmentation."""
        a, batch = self.augmentation, len(chosen)
        if a is None:
            return ()
        corner = torch.randint(2 * a.padding + 1, (2, batch, 1), device=self.device, generator=generator)
        flip = corner.new_zeros((batch, 1), dtype=torch.bool)
        if a.flip and a.alternating:
            flip = first[chosen, None] ^ bool(epoch % 2)
        elif a.flip:
            flip = torch.rand((batch, 1), device=self.device, generator=generator) < 0.5
        return corner[0], corner[1], flip

    def _draw_hidden(self, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Centres of the squares that are hidden, row and column (B, 1) each; () if there are none."""
        if not (self.augmentation and self.augmentation.cutout):
            return ()
        return tuple(torch.randint(n, (batch, 1), device=self.device, generator=generator) for n in self.size)

    def _square(self, row: Tensor, column: Tensor) -> Tensor:
        """Which pixels are hidden, (B, H, W)."""
        assert self.augmentation is not None
        half, inside = self.augmentation.cutout // 2, []
        for count, centre in zip(self.size, (row, column), strict=True):
            places = torch.arange(count, device=self.device) - centre + half  # (B, count), 0 where the square begins
            inside.append((places >= 0) & (places < self.augmentation.cutout))
        return inside[0][:, :, None] & inside[1][:, None, :]

    def _crop(self, chosen: Tensor, row: Tensor, column: Tensor, flip: Tensor) -> Tensor:
        """Crops and flips of the chosen images (B,) in one gather: (B, H, W, 3) uint8."""
        height, width = self.size
        rows = row + torch.arange(height, device=self.device)  # (B, H)
        columns = torch.arange(width, device=self.device).expand(len(chosen), width)
        columns = column + torch.where(flip, columns.flip(1), columns)  # (B, W)
        return self.pixels[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]


def _padded(pixels: Tensor, augmentation: RandomCrop | None) -> Tensor:
    """Images (N, H, W, 3) with what crops may show beyond them: (N, H + 2*padding, W + 2*padding, 3)."""
    pad = augmentation.padding if augmentation else 0
    if not (augmentation and augmentation.reflect):
        return F.pad(pixels, (0, 0, pad, pad, pad, pad))
    for axis in (1, 2):
        places = torch.arange(-pad, pixels.shape[axis] + pad).abs()
        last = pixels.shape[axis] - 1
        pixels = pixels.index_select(axis, torch.where(places > last, 2 * last - places, places))
    return pixels
