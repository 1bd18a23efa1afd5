"""Which images a process sees at which step: a function of seed, epoch and step, whatever the number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Loader(Protocol):
    """What the loop needs of a source of batches."""

    count: int  # images that a pass covers, over all processes
    device: torch.device
    replaced: int  # damaged images for which others were taken so far, in this process

    def __len__(self) -> int:
        """Steps of a pass."""

    def epoch(self, epoch: int = 0, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's batches of an epoch from a step on: images (B, 3, H, W) normalized, labels (B,)."""

    def weight(self, step: int) -> float:
        """By what the mean over this process's images counts in the mean of the processes' means; steps from 0."""


@dataclass(frozen=True)
class Shard:
    """One process's place among those that share every batch."""

    rank: int = 0
    size: int = 1

    def part(self, count: int) -> slice:
        """This process's places in a batch of `count` images; the parts differ by one image at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)


ALONE = Shard()


def smallest_share(batch: int, replicas: int, processes: int = 1) -> int:
    """Images that the last GPU gets when processes, and in each of them DataParallel's replicas, divide a batch."""
    batch //= processes
    share = max(1, -(-batch // replicas))
    return batch - share * ((batch - 1) // share)


@dataclass(frozen=True)
class Order:
    """`count` images in batches of `batch_size` over all processes; shuffled: training.

    Training leaves out a last batch in which one of the GPUs would get a single image: batch norm needs two.
    """

    total: int
    batch_size: int
    shuffled: bool
    seed: int = 0
    shard: Shard = ALONE
    replicas: int = 1

    @property
    def count(self) -> int:
        """Images that an epoch covers."""
        last = self.total % self.batch_size
        drop = self.shuffled and last > 0 and smallest_share(last, self.replicas, self.shard.size) < 2
        return self.total - last if drop else self.total

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def size(self, step: int) -> int:
        """Images of a step over all processes."""
        return min(self.batch_size, self.count - step * self.batch_size)

    def part(self, step: int) -> slice:
        """This process's places in the batch of a step."""
        return self.shard.part(self.size(step))

    def weight(self, step: int) -> float:
        """As `Loader.weight`: 1 unless the processes' parts differ."""
        part = self.part(step)
        mine: int = part.stop - part.start
        return self.shard.size * mine / self.size(step)

    def batch(self, indices: np.ndarray, step: int) -> np.ndarray:
        """This process's images of a step, of `indices` in the order of the epoch."""
        whole: np.ndarray = indices[step * self.batch_size :][: self.size(step)]
        return whole[self.part(step)]

    def indices(self, epoch: int) -> np.ndarray:
        """All images in the order of an epoch."""
        return make_generator(self.seed, epoch).permutation(self.total) if self.shuffled else np.arange(self.total)


def make_generator(*keys: int) -> np.random.Generator:
    """A random generator of its own for every tuple of non-negative numbers: (seed 0, epoch 1) is not (1, 0)."""
    return np.random.default_rng(np.random.SeedSequence(keys))
