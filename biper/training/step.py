"""One step of training, as it is or as a CUDA graph: forward pass, loss, backward pass, and what the optimizer does."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from biper.errors import one_line
from biper.nn.trials import changes_in_place
from biper.training.distributed import step_of_replicas
from biper.training.loss import LossTerm, add_up

log = logging.getLogger("biper")
StepOutcome: TypeAlias = tuple[dict[str, Tensor], Tensor]  # the terms of the loss by name, and the logits (B, classes)
WARM_UP = 3  # steps of a shape that are run as they are: kernels are chosen, and the optimizer's memory is there


class TrainingStep(Protocol):
    """What is done with a batch: one step of an optimizer on the sum of the loss's terms."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    @property
    def terms(self) -> Mapping[str, LossTerm]:
        """The loss's, by name."""

    def __call__(self, images: Tensor, labels: Tensor, weight: float) -> StepOutcome:
        """images: (B, 3, H, W); labels: (B,) or (B, classes); weight: what the images count among all processes'."""


@dataclass(frozen=True)
class PlainStep:
    """A step of SGD, or of another optimizer, as it is."""

    model: nn.Module
    optimizer: Optimizer
    terms: Mapping[str, LossTerm]

    def __call__(self, images: Tensor, labels: Tensor, weight: float) -> StepOutcome:
        """See TrainingStep."""
        with step_of_replicas():
            logits = self.model(images)
            values = {name: term.value(self.model, images, logits, labels) for name, term in self.terms.items()}
            self.optimizer.zero_grad(set_to_none=True)
            add_up(self.terms, values, weight).backward()
        self.optimizer.step()
        return {name: value.detach() for name, value in values.items()}, logits.detach()


@dataclass(frozen=True)
class Recording:
    """A graph, the memory that it reads, and what it leaves there."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    labels: Tensor
    outcome: StepOutcome


class GraphedStep:
    """A step on a GPU, which is recorded once for each shape of a batch, and then replayed.

    A small network's step is hundreds of kernels that take a few microseconds each, less than it takes to start them
    one by one. What differs from step to step lies in the GPU's memory: the batch, the learning rates, and the buffers
    of quantizers that change over the training. See `can_be_recorded`. The logits are valid until the next step.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self.optimizer, self.device = optimizer, device
        self.stream = torch.cuda.Stream(device)
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.known: list[float | None] = [None] * len(self.rates)  # what is in `rates`
        self.works = True
        self.step: PlainStep | None = None
        self.recordings: dict[object, Recording] = {}
        self.runs: Counter[object] = Counter()

    def take(self, step: PlainStep) -> "GraphedStep":
        """This, doing another step from now on: what was recorded of the last one goes, and with it its memory."""
        self.step, self.recordings, self.runs = step, {}, Counter()
        return self

    @property
    def model(self) -> nn.Module:
        """See TrainingStep."""
        return self._taken().model

    @property
    def terms(self) -> Mapping[str, LossTerm]:
        """See TrainingStep."""
        return self._taken().terms

    def _taken(self) -> PlainStep:
        assert self.step is not None
        return self.step

    def __call__(self, images: Tensor, labels: Tensor, weight: float) -> StepOutcome:
        """See TrainingStep."""
        self._send_rates()
        shape = (images.shape, labels.shape, weight)
        if shape not in self.recordings:
            self.runs[shape] += 1
            if self.runs[shape] <= WARM_UP or not self.works:
                return self._aside(images, labels, weight)
            try:
                self.recordings[shape] = self._record(images, labels, weight)
            except RuntimeError as error:
                self.works = False
                log.warning("CUDA graphs do not work here: going on without them (%s)", one_line(error))
                return self._aside(images, labels, weight)
        recording = self.recordings[shape]
        recording.images.copy_(images)
        recording.labels.copy_(labels)
        recording.graph.replay()
        values, logits = recording.outcome
        return {name: value.clone() for name, value in values.items()}, logits

    def _aside(self, images: Tensor, labels: Tensor, weight: float) -> StepOutcome:
        """A step as it is, on the stream on which graphs are recorded, as autograd wants it."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            outcome = self._run(images, labels, weight)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return outcome

    def _record(self, images: Tensor, labels: Tensor, weight: float) -> Recording:
        images, labels, graph = images.clone(), labels.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            outcome = self._run(images, labels, weight)
        return Recording(graph, images, labels, outcome)

    def _run(self, images: Tensor, labels: Tensor, weight: float) -> StepOutcome:
        """The step, with learning rates as it will find them when it is replayed, to the last bit."""
        with self._rates_in_memory():
            return self._taken()(images, labels, weight)

    @contextmanager
    def _rates_in_memory(self) -> Iterator[None]:
        """Context: the optimizer reads its learning rates where `_send_rates` writes them."""
        groups = self.optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self.rates, strict=True):
                group["lr"] = rate
            yield
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number

    def _send_rates(self) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            if group["lr"] != self.known[i]:
                self.known[i] = group["lr"]
                self.rates[i].fill_(group["lr"])


def can_be_recorded(network: nn.Module, optimizer: Optimizer) -> bool:
    """Whether a step on a GPU reads nothing but its memory, once batch and learning rates are there."""
    fused = isinstance(optimizer, SGD) and all(group["fused"] for group in optimizer.param_groups)
    return fused and changes_in_place(network)
