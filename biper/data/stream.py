"""Images that are read from files batch by batch, and flipped, turned, lit and normalized on the device."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from biper.data.pillow import Reader, Request
from biper.data.sharding import Order, make_generator
from biper.errors import UsageError

log = logging.getLogger("biper")

# principal components of ImageNet's colours (AlexNet): standard deviations, and as columns their directions in RGB
COLOUR_SCALES = (0.2175, 0.0188, 0.0045)
COLOUR_DIRECTIONS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


@dataclass(frozen=True)
class Augmentation:
    """What is done to a batch: a flip half the time, a turn of up to `degrees`, a random light of std `lighting`."""

    flip: bool = True
    degrees: float = 0.0
    lighting: float = 0.0


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch: flipped (B,), angle in degrees (B,), light (B, 3) along the components."""

    flipped: Tensor
    angle: Tensor
    light: Tensor


def draw(
    augmentation: Augmentation, count: int, part: slice, random: np.random.Generator, device: torch.device
) -> Draws:
    """Draw for a batch of `count` images over all processes, and keep this process's part."""
    flipped = random.random(count) < (0.5 if augmentation.flip else 0.0)
    angle = random.uniform(-augmentation.degrees, augmentation.degrees, count)
    light = random.normal(0.0, augmentation.lighting, (count, 3))
    kept = (torch.from_numpy(x[part]).to(device, non_blocking=True) for x in (flipped, angle, light))
    flips, angles, lights = kept
    return Draws(flips, angles.float(), lights.float())


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Images (B, C, H, W) turned counter-clockwise by degrees (B,) about their centre, nearest pixel, zero outside.

    The square images of a batch; the distribution of torchvision's RandomRotation.
    """
    radians = torch.deg2rad(degrees)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    theta = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)  # (B, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


class StreamLoader:
    """Batches of an `Order` from a reader, normalized float32 on the device. A Loader.

    What an image looks like depends on seed, epoch and its place in the order alone: not on the reader's kind, not on
    the number of workers or processes, not on where an epoch is taken up again.
    """

    def __init__(
        self,
        reader: Reader,
        order: Order,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.reader, self.order, self.device, self.augmentation = reader, order, device, augmentation
        self.count, self.replaced = order.count, 0
        self.mean = torch.tensor(mean, device=device)[:, None, None] * 255  # (3, 1, 1), of pixels in 0..255
        self.std = torch.tensor(std, device=device)[:, None, None] * 255
        scales, directions = torch.tensor(COLOUR_SCALES, device=device), torch.tensor(COLOUR_DIRECTIONS, device=device)
        self.colours = 255 * directions * scales  # (3 channels, 3 components)
        self._named: set[str] = set()

    def __len__(self) -> int:
        return len(self.order)

    def weight(self, step: int) -> float:
        """As `Loader.weight`."""
        return self.order.weight(step)

    def epoch(self, epoch: int = 0, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's batches of an epoch from a step on. Raises UsageError naming an image that cannot be read."""
        indices = self.order.indices(epoch)
        parts = [self.order.part(step) for step in range(len(self))]
        steps = [step for step in range(first_step, len(self)) if parts[step].stop > parts[step].start]
        requests = ([Request(int(i), epoch) for i in self.order.batch(indices, step)] for step in steps)
        batches = self.reader.read(requests)
        for step, batch in zip(steps, batches, strict=False):  # a reader ends early to tell an error
            if batch.error:
                raise UsageError(batch.error)
            self._tell(batch.replaced)
            images = self._present(batch.pixels.to(self.device, non_blocking=True), epoch, step)
            yield images, batch.labels.to(self.device, non_blocking=True)

    def _present(self, pixels: Tensor, epoch: int, step: int) -> Tensor:
        """(B, S, S, 3) uint8 -> (B, 3, S, S) float32, augmented and normalized."""
        images = pixels.permute(0, 3, 1, 2).float().contiguous()
        a = self.augmentation
        if a is None:
            return (images - self.mean) / self.std
        random = make_generator(self.order.seed, epoch, self.order.total + step)  # beyond the keys of the images' crops
        draws = draw(a, self.order.size(step), self.order.part(step), random, self.device)
        if a.degrees:
            images = rotate(images, draws.angle)
        images = torch.where(draws.flipped[:, None, None, None], images.flip(3), images)
        offset = draws.light @ self.colours.T  # (B, 3)
        return (images + offset[:, :, None, None] - self.mean) / self.std

    def _tell(self, replaced: list[list[str]]) -> None:
        self.replaced += len(replaced)
        for text in (text for wrong in replaced for text in wrong):
            if text not in self._named:
                self._named.add(text)
                log.warning("damaged image, another is taken: %s", text)
