"""A stage of training under way: its network, its optimizer, its history, and what a checkpoint of it holds."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from biper.data.loaders import Loader, Loaders
from biper.errors import UsageError
from biper.models import Network
from biper.models.checkpoint import FORMAT
from biper.nn.losses import periodic_layers
from biper.nn.quantization_error import quantization_error
from biper.nn.quantizers import set_progress
from biper.training.acceleration import Accelerated
from biper.training.averaging import MovingAverage
from biper.training.checkpoint import LATEST, save_checkpoint, versions
from biper.training.distributed import Processes, all_reduce_buffers, all_reduce_sum, broadcast_decision
from biper.training.log import Progress, metric_columns
from biper.training.loop import HITS, Metrics, Sums, Totals, check_finite, evaluate, train_one_epoch
from biper.training.loss import LossTerm
from biper.training.mixup import MixUp
from biper.training.optimizer import set_learning_rate
from biper.training.process import random_state
from biper.training.run_folder import run_folder, run_settings
from biper.training.schedule import CYCLES, lr_at, tau_at
from biper.training.settings import Settings
from biper.training.step import GraphedStep, PlainStep, TrainingStep

History = list[dict[str, Any]]  # a row an epoch


def best_row(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The epoch of the highest top-1, the first of equals."""
    return max(history, key=lambda row: row["test_top1"])


def saved_sums(partial: Mapping[str, Any]) -> Sums:
    """What a checkpoint within an epoch has summed up. Earlier versions saved the sums of four names as a list."""
    sums = partial.get("sums", {})
    if not isinstance(sums, Mapping):
        sums = dict(zip(("loss", "regularizer", *HITS), sums, strict=True))
    return Sums(sums, partial.get("count", 0))


@dataclass
class Trainer:
    """A stage of training under way. All processes have one, and call its methods together."""

    settings: Settings
    processes: Processes
    devices: Sequence[torch.device]
    loaders: Loaders
    network: Network  # what is trained and saved
    fast: Accelerated  # the same parameters, as they are run
    model: nn.Module  # `fast`, with the other processes or GPUs if there are any
    optimizer: Optimizer
    make_terms: Callable[[float], Mapping[str, LossTerm]]  # the loss's, from tau
    average: MovingAverage | None = None  # of the network, which is evaluated and saved in its place
    graphs: GraphedStep | None = None  # that records its steps, on a GPU
    teacher: str = ""  # the SHA-256 of its file
    epoch: int = 0  # the next one
    history: History = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)  # of the epochs in the history; None: not known
    step: int = 0  # how many of the next epoch's are done
    partial: dict[str, Any] = field(default_factory=dict)  # what those steps have summed up, over all processes

    def __post_init__(self) -> None:
        self.folder = run_folder(self.settings)
        self.saved_at = time.monotonic()
        self._step: tuple[float, TrainingStep] | None = None  # the last one, and its tau
        self._replaced_before = 0  # what is to be added to the loader's count to get this epoch's

    def describe(self) -> str:
        """How it computes, in a few words."""
        return f"{self.fast.describe()}{' and CUDA graphs' if self.graphs else ''}"

    def contents(self) -> dict[str, Any]:
        """Everything that a checkpoint holds: the published keys first, then ours. To be called inside `_averaged`."""
        best = best_row(self.history) if self.history else {"test_top1": 0.0, "test_top5": 0.0, "epoch": 0}
        schedule = {"lr_type": self.settings.lr_type, "last_epoch": self.epoch - 1, "last_lr": self.last_lr()}
        return {
            "epoch": self.epoch,
            "model": self.settings.model,
            "state_dict": self.network.state_dict(),
            "best_prec1": best["test_top1"],
            "best_prec5": best["test_top5"],
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": schedule,
            "format": FORMAT,
            "step": self.step,
            "partial": self.partial,
            "best_epoch": best["epoch"],
            "history": self.history,
            "seconds": self.seconds,
            "metadata": self.network.metadata.to_plain(),
            "progress": self.progress(self.step),
            "settings": run_settings(self.settings),
            "random_state": random_state(),
            "versions": versions(),
            **({"not_averaged": self.average.hidden()} if self.average else {}),
            **({"teacher": self.teacher} if self.teacher else {}),
        }

    def progress(self, steps: int) -> float:
        """How much of the training is done after some steps of this epoch, 0 to 1: what quantizers are told."""
        return (self.epoch + steps / len(self._train_loader())) / self.settings.epochs

    def last_lr(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def is_best(self) -> bool:
        """Whether the last epoch is the best so far."""
        return best_row(self.history) is self.history[-1]

    def run_epoch(self) -> None:
        """Train what is left of an epoch, evaluate it, and enter it in the history. Saves within the epoch if due."""
        settings, epoch = self.settings, self.epoch
        tau = tau_at(epoch, epochs=settings.epochs, tau_min=settings.tau_min, tau_max=settings.tau_max)
        tau = tau if settings.regularizer and periodic_layers(self.network)[0] else 0.0
        lr = self._set_learning_rate()
        totals, train = self._train(self._choose_step(tau))
        all_reduce_buffers(self.network)
        check_finite(self.network, f"at the end of epoch {epoch + 1}")
        set_progress(self.network, self.progress(len(self._train_loader())))  # as its checkpoint has it
        test = self._evaluate_or_keep(totals)
        error = quantization_error(self.network)  # of the binary layers' weights, which have no average
        columns = metric_columns("train", train) | {"train_replaced": self._replaced()} | metric_columns("test", test)
        self.history.append({"epoch": epoch + 1, "lr": lr, "tau": tau, **columns, "qe": error.qe, "b": error.b})
        self.epoch, self.step, self.partial = epoch + 1, 0, {}

    def _set_learning_rate(self, steps: int = 0) -> float:
        settings = self.settings
        lr = lr_at(
            self.epoch + steps / len(self._train_loader()),
            lr=settings.lr,
            epochs=settings.epochs,
            lr_type=settings.lr_type,
            lr_decay_step=settings.lr_decay_step,
            warm_up=settings.warm_up,
            warm_up_epochs=settings.warm_up_epochs,
            lr_peak=settings.lr_peak,
        )
        set_learning_rate(self.optimizer, lr)
        return lr

    def _before_step(self, steps: int) -> None:
        """What changes from step to step, after `steps` of this epoch."""
        set_progress(self.network, self.progress(steps))
        if self.settings.lr_type in CYCLES:
            self._set_learning_rate(steps)

    def _train(self, step: TrainingStep) -> tuple[Totals, Metrics]:
        """What is left of the epoch's steps; what an interrupted one had counted goes on in the first process."""
        settings, loader = self.settings, self._train_loader()
        earlier = self.partial if self.processes.main else {}
        self._replaced_before = earlier.get("replaced", 0) - loader.replaced
        totals = Totals(loader.device, f"epoch {self.epoch + 1}", tuple(step.terms), saved_sums(earlier))
        title = f"epoch {self.epoch + 1}/{settings.epochs}"
        with Progress(title, len(loader), settings.print_freq, self.step) as progress:
            metrics = train_one_epoch(
                step,
                loader,
                epoch=self.epoch,
                watcher=progress,
                totals=totals,
                first_step=self.step,
                mix=self._mix(),
                before_step=self._before_step,
                after_step=self._after_step,
            )
        return totals, metrics

    def _choose_step(self, tau: float) -> TrainingStep:
        """What is done with a batch: another step where tau changes, as a recording has tau in it."""
        if self._step is None or self._step[0] != tau:
            plain = PlainStep(self.model, self.optimizer, self.make_terms(tau))
            self._step = tau, (self.graphs.take(plain) if self.graphs else plain)
        return self._step[1]

    def _mix(self) -> MixUp | None:
        alpha = self.settings.mixup
        return MixUp(alpha, len(self.loaders.classes), self.settings.seed) if alpha else None

    def _train_loader(self) -> Loader:
        assert self.loaders.train is not None
        return self.loaders.train

    def _evaluate_or_keep(self, totals: Totals) -> Metrics:
        """The test metrics. Raises UsageError, with the epoch's training saved, if a test image cannot be read."""
        steps = len(self._train_loader())
        if self.processes.size > 1:  # if one process cannot read a test image, the others hear of it too late to save
            self._save_within(steps, totals)
        try:
            return self._evaluate()
        except UsageError as error:
            if self.processes.size == 1:
                self._save_within(steps, totals)
            raise UsageError(f"{error}; the epoch's training is kept: mend the data and go on with --resume") from error

    def _evaluate(self) -> Metrics:
        settings, loader, number = self.settings, self.loaders.test, self.epoch + 1
        model = self.fast if self.processes.size > 1 else self.model
        title = f"epoch {number}/{settings.epochs} test"
        with Progress(title, len(loader), settings.print_freq) as progress, self._averaged():
            return evaluate(model, loader, progress, f"the evaluation after epoch {number}")

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Context: the network is what is evaluated and saved, the same in all processes."""
        if self.average is None:
            yield
            return
        with self.average.shown():
            all_reduce_buffers(self.network)
            yield

    def _after_step(self, step: int, totals: Totals) -> None:
        if self.average is not None:
            self.average.update(self.epoch * len(self._train_loader()) + step)
        self._save_if_due(step, totals)

    def _save_if_due(self, step: int, totals: Totals) -> None:
        minutes = self.settings.checkpoint_minutes
        if minutes and broadcast_decision(time.monotonic() - self.saved_at >= 60 * minutes):
            self._save_within(step, totals)

    def _save_within(self, step: int, totals: Totals) -> None:
        so_far = totals.all_reduce()
        all_reduce_buffers(self.network)
        check_finite(self.network, f"after step {step} of epoch {self.epoch + 1}")
        self.step, self.partial = step, {**asdict(so_far), "replaced": self._replaced()}
        self.save()

    def _replaced(self) -> int:
        """Damaged images of this epoch for which others were taken, over all processes."""
        return int(all_reduce_sum(torch.tensor(self._replaced_before + self._train_loader().replaced)).item())

    def save(self) -> None:
        """Write the latest checkpoint, in the first process alone."""
        with self._averaged():
            if self.processes.main:
                save_checkpoint(self.contents(), self.folder / LATEST)
        self.saved_at = time.monotonic()
