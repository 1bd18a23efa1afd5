"""One pass over the data: train_one_epoch and evaluate. Nothing in the loops waits for the device."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from biper.data.sharding import Loader
from biper.errors import TrainingDiverged
from biper.nn.losses import Regularizer, periodic_regularizer
from biper.training.distributed import all_reduce_sum, step_of_replicas
from biper.training.process import DelayedRead


@dataclass(frozen=True)
class Metrics:
    """Means over `count` images: cross-entropy, regularizer (0 in evaluation), top-1 and top-5 in percent."""

    loss: float
    regularizer: float
    top1: float
    top5: float
    count: int


class Watcher(Protocol):
    """Whoever wants to see a pass going on."""

    print_freq: int

    def advance(self, step: int, running: Metrics | None) -> None:
        """Called after every step; `running` is there about every print_freq steps, a little late."""


class Totals:
    """Sums of a pass, kept on the device. `sums` and `count` may begin with those of an earlier part of the pass."""

    def __init__(self, device: torch.device, where: str, sums: Sequence[float] = (0.0,) * 4, count: int = 0) -> None:
        # loss, regularizer, top-1 and top-5 hits; this process's alone
        self.sums = torch.tensor(sums, dtype=torch.float64, device=device)
        self.losses: dict[int, Tensor] = {}  # one scalar a step, to name the step that diverged
        self.count = count
        self.where = where
        self._read = DelayedRead()

    def add(self, step: int, loss: Tensor, regularizer: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a step, counted from 1. loss, regularizer: scalars; logits: (B, classes); labels: (B,)."""
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        batch = len(labels)
        sums = torch.stack([loss * batch, regularizer * batch, best[:, 0].sum(), best.sum()])
        self.sums += sums.detach()
        self.losses[step] = (loss + regularizer).detach()
        self.count += batch

    def glance(self, ask: bool) -> Metrics | None:
        """The means so far, once they have arrived; `ask` requests them. Raises TrainingDiverged if not finite."""
        if ask:
            self._read.start(torch.cat([self.sums, self.sums.new_full((1,), self.count)]))
        values = self._read.poll()
        if values is None:
            return None
        if not math.isfinite(values[0] + values[1]):
            self._name_divergence()
        return self._metrics(values[:4], int(values[4]))

    def over_processes(self) -> tuple[list[float], int]:
        """The sums and the count of all processes; this waits for the device. Raises TrainingDiverged."""
        values = all_reduce_sum(torch.cat([self.sums, self.sums.new_full((1,), self.count)])).tolist()
        if not math.isfinite(values[0] + values[1]):  # every process sees it, so all of them stop
            self._name_divergence()
            raise TrainingDiverged(f"the loss is {values[0] + values[1]} in {self.where}")
        return values[:4], int(values[4])

    def metrics(self) -> Metrics:
        """The means of the whole pass over all processes; this waits for the device. Raises TrainingDiverged."""
        return self._metrics(*self.over_processes())

    def _metrics(self, sums: list[float], count: int) -> Metrics:
        loss, regularizer, top1, top5 = sums
        return Metrics(loss / count, regularizer / count, 100 * top1 / count, 100 * top5 / count, count)

    def _name_divergence(self) -> None:
        finite = torch.stack(list(self.losses.values())).isfinite().tolist()
        for (step, loss), good in zip(self.losses.items(), finite, strict=True):
            if not good:
                raise TrainingDiverged(f"the loss is {loss.item()} in {self.where}, step {step}")


def train_one_epoch(
    model: nn.Module,
    loader: Loader,
    optimizer: Optimizer,
    *,
    epoch: int,
    tau: float,
    watcher: Watcher,
    regularizer: Regularizer = periodic_regularizer,
    totals: Totals | None = None,
    first_step: int = 0,
    after_step: Callable[[int, Totals], None] = lambda step, totals: None,
) -> Metrics:
    """One epoch of SGD on cross-entropy plus the periodic regularizer, whose weight is tau (0: none).

    first_step, totals: where an interrupted epoch is taken up, and what it had summed up by then; after_step is called
    with the number of steps that are done; regularizer: loss.periodic_regularizer or its equal. Raises
    TrainingDiverged, naming epoch and step, when the loss is not finite.
    """
    model.train()
    totals = totals or Totals(loader.device, f"epoch {epoch + 1}")
    for step, (images, labels) in enumerate(loader.epoch(epoch, first_step), first_step + 1):
        with step_of_replicas():
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            penalty = regularizer(model, tau) if tau else loss.new_zeros(())
            optimizer.zero_grad(set_to_none=True)
            torch.add(loss * loader.weight(step - 1), penalty).backward()
        optimizer.step()
        totals.add(step, loss, penalty, logits, labels)
        watcher.advance(step, totals.glance(ask=step % watcher.print_freq == 0))
        after_step(step, totals)
    return totals.metrics()


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Loader, watcher: Watcher, where: str = "evaluation") -> Metrics:
    """Cross-entropy, top-1 and top-5 over every image once. Raises TrainingDiverged when the loss is not finite."""
    model.eval()
    totals = Totals(loader.device, where)
    for step, (images, labels) in enumerate(loader.epoch(), 1):
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        totals.add(step, loss, loss.new_zeros(()), logits, labels)
        watcher.advance(step, totals.glance(ask=step % watcher.print_freq == 0))
    return totals.metrics()


def check_finite(model: nn.Module, where: str) -> None:
    """Raise TrainingDiverged naming a weight or statistic that is not finite; this waits for the device.

    A sign turns NaN into a number, so a finite loss alone does not prove finite weights.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    finite = torch.stack([tensor.isfinite().all() for tensor in state.values()]).tolist()
    for name, good in zip(state, finite, strict=True):
        if not good:
            raise TrainingDiverged(f"{name} is no longer finite {where}")
