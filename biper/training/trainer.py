"""A stage of training under way: its network, its optimizer, its history, and what a checkpoint of it holds."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from biper.data.loaders import Loader, Loaders, Shard, build_loaders, require_same_classes
from biper.errors import UsageError, naming
from biper.kinds import require
from biper.models import Network
from biper.models.checkpoint import FORMAT, load_checkpoint, own_metadata, read_checkpoint, rebuild
from biper.models.metadata import Metadata
from biper.models.methods import BIPER, network_of_method
from biper.models.registry import require_runs
from biper.nn.layers import binarize_
from biper.nn.losses import opposite, periodic_layers
from biper.nn.quantization_error import quantization_error
from biper.nn.quantizers import changes_over_training, set_progress
from biper.training.acceleration import Accelerated, accelerate, chosen_amp
from biper.training.averaging import MovingAverage
from biper.training.checkpoint import LATEST, save_checkpoint, versions
from biper.training.distillation import distillation, load_teacher
from biper.training.distributed import (
    Processes,
    all_gather_equal,
    all_reduce_buffers,
    all_reduce_sum,
    broadcast_decision,
    replicated,
)
from biper.training.log import Progress, metric_columns
from biper.training.loop import (
    HITS,
    Metrics,
    Sums,
    Totals,
    check_finite,
    evaluate,
    train_one_epoch,
)
from biper.training.loss import LossTerm, make_loss_terms
from biper.training.mixup import MixUp
from biper.training.optimizer import Factors, build_optimizer, load_optimizer, set_learning_rate
from biper.training.process import random_state, seed_everything, select_devices, set_random_state
from biper.training.run_folder import check_folder, run_folder, run_settings
from biper.training.schedule import CYCLES, lr_at, tau_at
from biper.training.settings import METHOD, Settings
from biper.training.step import GraphedStep, TrainingStep, can_be_recorded, make_plain_step

History = list[dict[str, Any]]  # a row an epoch


def initial_network(config: Settings, num_classes: int) -> Network:
    """Stage 1: a fresh network. Stage 2: stage 1's network with binary weights (warm start).

    With from_scratch stage 2 gets a fresh network too, the one that stage 1 of the same seed begins with.
    """
    if config.stage == 1 or config.from_scratch:
        return fresh_network(config, num_classes)
    path = Path(config.load_ckpt_stage1)
    freq = config.freq if config.quantizer == BIPER else None  # which no other need have
    network = load_checkpoint(path, freq, model=config.model, family=config.family, stage=1)
    binarize_(network)
    return network


def fresh_network(config: Settings, num_classes: int) -> Network:
    """A network of the settings' model and method, whose weights are as the stage has them."""
    c = config
    method = {name: getattr(c, name) for name in METHOD}
    return network_of_method(c.model, c.family, num_classes, stage=c.stage, freq=c.freq, **method)


def attach_data(network: Network, loaders: Loaders, dataset: str) -> None:
    """Write into the network's metadata what it is trained on. Raises UsageError if it does not fit the data."""
    require_same_classes(network.metadata, loaders)
    network.metadata = replace(
        network.metadata,
        dataset=dataset,
        classes=loaders.classes,
        class_names=loaders.class_names,
        mean=loaders.mean,
        std=loaders.std,
        image_size=loaders.image_size,
    )
    require_runs(network, loaders.image_size)  # before anything is written


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
    epoch: int = 0  # the next one
    history: History = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)  # of the epochs in the history; None: not known
    step: int = 0  # how many of the next epoch's are done
    partial: dict[str, Any] = field(default_factory=dict)  # what those steps have summed up, over all processes

    def __post_init__(self) -> None:
        self.folder = run_folder(self.settings)
        self.saved_at = time.monotonic()
        self._graphed: GraphedStep | None = None
        self._recorded_tau: float | None = None  # with which it was recorded
        self._replaced_before = 0  # what is to be added to the loader's count to get this epoch's

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
        totals, train = self._train(tau)
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

    def _train(self, tau: float) -> tuple[Totals, Metrics]:
        """What is left of the epoch's steps; what an interrupted one had counted goes on in the first process."""
        settings, loader, terms = self.settings, self._train_loader(), self.make_terms(tau)
        earlier = self.partial if self.processes.main else {}
        self._replaced_before = earlier.get("replaced", 0) - loader.replaced
        totals = Totals(loader.device, f"epoch {self.epoch + 1}", tuple(terms), saved_sums(earlier))
        title = f"epoch {self.epoch + 1}/{settings.epochs}"
        with Progress(title, len(loader), settings.print_freq, self.step) as progress:
            metrics = train_one_epoch(
                self.model,
                loader,
                self.optimizer,
                epoch=self.epoch,
                terms=terms,
                watcher=progress,
                step=self._choose_step(tau, terms),
                totals=totals,
                first_step=self.step,
                mix=self._mix(),
                before_step=self._before_step,
                after_step=self._after_step,
            )
        return totals, metrics

    def _choose_step(self, tau: float, terms: Mapping[str, LossTerm]) -> TrainingStep:
        """What is done with a batch. On a GPU it is recorded once, and again where tau changes, which is part of it."""
        step = make_plain_step(self.model, self.optimizer, terms)
        if not self.fast.graphed:
            return step
        if self._graphed is None:
            self._graphed = GraphedStep(self.optimizer, self.devices[0])
        if self._recorded_tau != tau:
            self._graphed.take(step)
            self._recorded_tau = tau
        return self._graphed

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


def build_trainer(settings: Settings, processes: Processes) -> Trainer:
    """The trainer of a run, from its latest checkpoint with --resume. Writes nothing; all processes call it together.

    Raises UsageError if the settings, the data or the folder are unfit.
    """
    folder = run_folder(settings)
    check_folder(folder, settings.resume)
    devices = select_devices(settings.device, settings.gpus, settings.type, processes)
    seed_everything(settings.seed, settings.deterministic)
    shard = Shard(processes.rank, processes.size)
    loaders = build_loaders(settings, devices[0], replicas=len(devices), shard=shard)
    settings = replace(settings, amp=chosen_amp(settings.amp, devices[0]))
    latest = folder / LATEST
    saved = read_checkpoint(latest) if settings.resume and latest.exists() else None
    if saved:
        network = rebuild(own_metadata(saved, latest), saved["state_dict"], latest)
    else:
        network = initial_network(settings, len(loaders.classes))
    attach_data(network, loaders, settings.dataset)
    if settings.extend and changes_over_training(network):
        text = "the quantizers change until the last epoch; with more epochs it is another run"
        raise UsageError(f"--extend {settings.extend}: {text}: start one with --epochs N and another --save")
    with naming(latest):
        progress = saved_progress(saved) if saved else {"epoch": settings.start_epoch}
    steps = (settings.epochs - progress["epoch"]) * len(loaders.train or ())
    fast = accelerate_network(network, settings, devices, processes, steps)
    optimizer = build_optimizer(
        network,
        family=settings.family,
        name=settings.optimizer,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        factors=Factors(settings.lr_alpha, settings.lr_norm_bias),
    )
    fast.graphed = fast.graphed and can_be_recorded(network, optimizer)
    average = MovingAverage(network, settings.ema) if settings.ema else None
    if saved:
        with naming(latest):
            _require_place(progress, settings.epochs, len(loaders.train or ()))
            if average:
                average.go_on_from(saved.get("not_averaged", {}))
            load_optimizer(optimizer, saved["optimizer"])
            set_random_state(saved["random_state"])
    all_gather_equal((progress["epoch"], progress.get("step", 0)), "where to go on")
    model, terms = parallelize(fast, devices, processes), choose_terms(settings, fast, network.metadata, devices[0])
    return Trainer(settings, processes, devices, loaders, network, fast, model, optimizer, terms, average, **progress)


def saved_progress(saved: Mapping[str, Any]) -> dict[str, Any]:
    """How far a run has got, of its checkpoint, as arguments of Trainer.

    Raises UsageError if it lacks what training goes on from.
    """
    require(saved, {}, ("epoch", "history", "optimizer", "random_state"))
    history = saved["history"]
    return {
        "epoch": saved["epoch"],
        "history": history,
        "seconds": saved.get("seconds", [None] * len(history)),  # which earlier versions did not save
        "step": saved.get("step", 0),
        "partial": saved.get("partial", {}),
    }


def _require_place(progress: Mapping[str, Any], epochs: int, steps: int) -> None:
    """Raise UsageError for a place that a run of so many epochs, of so many steps each, does not come to."""
    epoch, step, history = progress["epoch"], progress["step"], progress["history"]
    rows = [row["epoch"] for row in history] == list(range(epoch - len(history) + 1, epoch + 1))
    if epoch > epochs or step > steps or (epoch == epochs and step) or not rows:
        raise UsageError(f"epoch {epoch}, step {step} and {len(history)} rows of history do not belong together")


def accelerate_network(
    network: Network, settings: Settings, devices: Sequence[torch.device], processes: Processes, steps: int
) -> Accelerated:
    """The network on the first device, as fast as the settings allow, for `steps` steps."""
    compiled = settings.compile and len(devices) == 1
    graphed = compiled and processes.size == 1
    amp = settings.amp == "bf16"
    return accelerate(network, devices[0], amp=amp, compiled=compiled, graphed=graphed, steps=steps)


def parallelize(fast: Accelerated, devices: Sequence[torch.device], processes: Processes) -> nn.Module:
    """The network as it is trained: in other processes too, or on other GPUs of this one, or as it is."""
    if processes.size > 1:
        return replicated(fast)
    return nn.DataParallel(fast, devices) if len(devices) > 1 else fast


def choose_terms(
    settings: Settings, fast: Accelerated, student: Metadata, device: torch.device
) -> Callable[[float], Mapping[str, LossTerm]]:
    """The terms of the loss, from tau: cross-entropy, the periodic regularizer in its form, and a teacher's if any."""
    c = settings
    regularizer = opposite(fast.regularizer) if c.regularizer_form == "cos2" else fast.regularizer
    teacher = None
    if c.teacher:
        network = load_teacher(Path(c.teacher), student).to(device).to(memory_format=torch.channels_last)
        how = {"temperature": c.temperature, "weight": c.teacher_weight}
        teacher = distillation(network, **how, bf16=c.amp == "bf16")
    return functools.partial(
        make_loss_terms, regularizer=regularizer, label_smoothing=c.label_smoothing, teacher=teacher
    )
