"""One pass over the data: train_one_epoch and evaluate. Nothing in the loops waits for the device."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biper.data.sharding import Loader
from biper.errors import TrainingDiverged
from biper.training.distributed import all_reduce_sum
from biper.training.process import DelayedRead
from biper.training.step import TrainingStep

Mix = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]  # images, labels, epoch, step -> images, labels
HITS = ("top1", "top5")  # counted beside the terms of the loss


@dataclass(frozen=True)
class Metrics:
    """Means over `count` images: of the loss's terms by name, and top-1 and top-5 in percent."""

    terms: Mapping[str, float]
    top1: float
    top5: float
    count: int

    @property
    def loss(self) -> float:
        """The cross-entropy."""
        return self.terms["loss"]

    @property
    def regularizer(self) -> float:
        """The periodic regularizer; 0 where it is no term of the loss, as in evaluation."""
        return self.terms.get("regularizer", 0.0)


class Watcher(Protocol):
    """Whoever wants to see a pass going on."""

    print_freq: int

    def advance(self, step: int, running: Metrics | None) -> None:
        """Called after every step; `running` is there about every print_freq steps, a little late."""


@dataclass(frozen=True)
class Sums:
    """What a pass, or a part of it, has summed up over `count` images: the loss's terms by name, and top1, top5."""

    sums: Mapping[str, float] = field(default_factory=dict)
    count: int = 0

    def metrics(self) -> Metrics:
        """The means."""
        terms = {name: value / self.count for name, value in self.sums.items() if name not in HITS}
        top1, top5 = (100 * self.sums[name] / self.count for name in HITS)
        return Metrics(terms, top1, top5, self.count)


class Totals:
    """Sums of a pass, kept on the device; they may begin with those of an earlier part of the pass.

    terms: the names of the loss's terms.
    """

    def __init__(self, device: torch.device, where: str, terms: Sequence[str], earlier: Sums | None = None) -> None:
        earlier = earlier or Sums()
        self.names = (*terms, *HITS)
        # this process's alone
        self.sums = torch.tensor(
            [earlier.sums.get(name, 0.0) for name in self.names], dtype=torch.float64, device=device
        )
        self.losses: dict[int, Tensor] = {}  # one scalar a step, to name the step that diverged
        self.count = earlier.count
        self.where = where
        self._read = DelayedRead()

    def add(self, step: int, terms: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> None:
        """Add a step, counted from 1. terms: scalars, means over its images; logits: (B, classes); labels: (B,)."""
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        batch = len(labels)
        values = list(terms.values())
        sums = torch.stack([*(value * batch for value in values), best[:, 0].sum(), best.sum()])
        self.sums += sums.detach()
        self.losses[step] = sum(values[1:], values[0]).detach()
        self.count += batch

    def glance(self, ask: bool) -> Metrics | None:
        """The means so far, once they have arrived; `ask` requests them. Raises TrainingDiverged if not finite."""
        if ask:
            self._read.start(torch.cat([self.sums, self.sums.new_full((1,), self.count)]))
        values = self._read.poll()
        if values is None:
            return None
        if not math.isfinite(self._loss(values)):
            self._name_divergence()
        return self._named(values).metrics()

    def all_reduce(self) -> Sums:
        """The sums over all processes; this waits for the device. Raises TrainingDiverged."""
        values = all_reduce_sum(torch.cat([self.sums, self.sums.new_full((1,), self.count)])).tolist()
        if not math.isfinite(self._loss(values)):  # every process sees it, so all of them stop
            self._name_divergence()
            raise TrainingDiverged(f"the loss is {self._loss(values)} in {self.where}")
        return self._named(values)

    def _loss(self, values: Sequence[float]) -> float:
        return sum(values[: len(self.names) - len(HITS)])

    def _named(self, values: Sequence[float]) -> Sums:
        *sums, count = values
        return Sums(dict(zip(self.names, sums, strict=True)), int(count))

    def _name_divergence(self) -> None:
        finite = torch.stack(list(self.losses.values())).isfinite().tolist()
        for (step, loss), good in zip(self.losses.items(), finite, strict=True):
            if not good:
                raise TrainingDiverged(f"the loss is {loss.item()} in {self.where}, step {step}")


def train_one_epoch(
    step: TrainingStep,
    loader: Loader,
    *,
    epoch: int,
    watcher: Watcher,
    totals: Totals | None = None,
    first_step: int = 0,
    mix: Mix | None = None,
    before_step: Callable[[int], None] = lambda steps: None,
    after_step: Callable[[int, Totals], None] = lambda step, totals: None,
) -> Metrics:
    """One epoch of a step, of whose loss one term is called `loss`.

    first_step, totals: where an interrupted epoch is taken up, and what it had summed up by then; mix: what is made of
    a batch before the network sees it; before_step and after_step are called with the number of steps that are done.
    Accuracies are those by the labels themselves. Raises TrainingDiverged, naming epoch and step, when the loss is not
    finite.
    """
    step.model.train()
    totals = totals or Totals(loader.device, f"epoch {epoch + 1}", tuple(step.terms))
    for number, (images, labels) in enumerate(loader.epoch(epoch, first_step), first_step + 1):
        before_step(number - 1)
        shown, targets = mix(images, labels, epoch, number) if mix else (images, labels)
        values, logits = step(shown, targets, loader.weight(number - 1))
        totals.add(number, values, logits, labels)
        watcher.advance(number, totals.glance(ask=number % watcher.print_freq == 0))
        after_step(number, totals)
    return totals.all_reduce().metrics()


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Loader, watcher: Watcher, where: str = "evaluation") -> Metrics:
    """Cross-entropy, top-1 and top-5 over every image once. Raises TrainingDiverged when the loss is not finite."""
    model.eval()
    totals = Totals(loader.device, where, ("loss",))
    for step, (images, labels) in enumerate(loader.epoch(), 1):
        logits = model(images)
        totals.add(step, {"loss": F.cross_entropy(logits, labels)}, logits, labels)
        watcher.advance(step, totals.glance(ask=step % watcher.print_freq == 0))
    return totals.all_reduce().metrics()


def check_finite(model: nn.Module, where: str) -> None:
    """Raise TrainingDiverged naming a weight or statistic that is not finite; this waits for the device.

    A sign turns NaN into a number, so a finite loss alone does not prove finite weights.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    finite = torch.stack([tensor.isfinite().all() for tensor in state.values()]).tolist()
    for name, good in zip(state, finite, strict=True):
        if not good:
            raise TrainingDiverged(f"{name} is no longer finite {where}")
