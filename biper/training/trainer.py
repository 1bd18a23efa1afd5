"""A stage of training under way: its network, its optimizer, its history, and what a checkpoint of it holds."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from biper.data.loaders import Loader, Loaders, Shard, build_loaders, require_same_classes
from biper.errors import UsageError
from biper.models import Network, create_model
from biper.models.checkpoint import FORMAT, load_checkpoint, own_metadata, read_checkpoint, rebuild
from biper.nn.layers import binarize_
from biper.nn.losses import opposite
from biper.nn.quantization_error import quantization_error
from biper.training.acceleration import accelerate, chosen_amp
from biper.training.checkpoint import LATEST, save_checkpoint, versions
from biper.training.distributed import (
    Processes,
    all_gather_equal,
    all_reduce_buffers,
    all_reduce_sum,
    broadcast_decision,
    replicated,
)
from biper.training.log import Progress, metric_columns
from biper.training.loop import Metrics, Totals, check_finite, evaluate, train_one_epoch
from biper.training.optimizer import build_optimizer, load_optimizer
from biper.training.process import random_state, seed_everything, select_devices, set_random_state
from biper.training.run_folder import check_folder, run_folder, run_settings
from biper.training.schedule import lr_at, tau_at
from biper.training.settings import Settings

History = list[dict[str, Any]]  # a row an epoch


def initial_network(config: Settings, num_classes: int) -> Network:
    """Stage 1: a fresh network. Stage 2: stage 1's network with the square wave switched on (warm start).

    With from_scratch stage 2 gets a fresh network too, the one that stage 1 of the same seed begins with.
    """
    if config.stage == 1 or config.from_scratch:
        c = config
        return create_model(c.model, family=c.family, num_classes=num_classes, freq=c.freq, stage=c.stage)
    path = Path(config.load_ckpt_stage1)
    network = load_checkpoint(path, config.freq, model=config.model, family=config.family, stage=1)
    binarize_(network)
    return network


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
    with torch.no_grad():  # one image through it, before anything is written
        network.eval()(torch.zeros(1, 3, loaders.image_size, loaders.image_size))


def best_row(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The epoch of the highest top-1, the first of equals."""
    return max(history, key=lambda row: row["test_top1"])


class Stage:
    """Making one writes nothing; all processes make one together."""

    def __init__(self, config: Settings, processes: Processes) -> None:
        self.config, self.processes = config, processes
        c = config
        self.folder = run_folder(c)
        check_folder(self.folder, c.resume)
        self.devices = select_devices(c.device, c.gpus, c.type, processes)
        seed_everything(c.seed, c.deterministic)
        shard = Shard(processes.rank, processes.size)
        self.loaders = build_loaders(c, self.devices[0], replicas=len(self.devices), shard=shard)
        latest = self.folder / LATEST
        saved = read_checkpoint(latest) if c.resume and latest.exists() else None
        if saved:
            self.network = rebuild(own_metadata(saved, latest), saved["state_dict"], latest)
        else:
            self.network = initial_network(c, len(self.loaders.classes))
        attach_data(self.network, self.loaders, c.dataset)
        self.config = replace(c, amp=chosen_amp(c.amp, self.devices[0]))
        self.fast = accelerate(
            self.network,
            self.devices[0],
            amp=self.config.amp == "bf16",
            compiled=c.compile and len(self.devices) == 1,
            steps=(c.epochs - (saved["epoch"] if saved else c.start_epoch)) * len(self.loaders.train or ()),
        )
        self.optimizer = build_optimizer(
            self.network,
            family=c.family,
            name=c.optimizer,
            lr=c.lr,
            momentum=c.momentum,
            weight_decay=c.weight_decay,
        )
        self.history: History = []
        self.epoch, self.step = c.start_epoch, 0  # the next epoch, and how many of its steps are done
        self.partial: dict[str, Any] = {}  # what those steps have summed up, over all processes
        if saved:
            self._go_on_from(saved)
        all_gather_equal((self.epoch, self.step), "where to go on")
        self.model = self._parallel()
        self.saved_at = time.monotonic()

    def _go_on_from(self, saved: dict[str, Any]) -> None:
        load_optimizer(self.optimizer, saved["optimizer"])
        self.history, self.epoch = saved["history"], saved["epoch"]
        self.step, self.partial = saved.get("step", 0), saved.get("partial", {})
        set_random_state(saved["random_state"])

    def _parallel(self) -> nn.Module:
        """The network as it is trained: in other processes too, or on other GPUs of this one, or as it is."""
        if self.processes.size > 1:
            return replicated(self.fast)
        return nn.DataParallel(self.fast, self.devices) if len(self.devices) > 1 else self.fast

    def contents(self) -> dict[str, Any]:
        """Everything that a checkpoint holds: the published keys first, then ours."""
        best = best_row(self.history) if self.history else {"test_top1": 0.0, "test_top5": 0.0, "epoch": 0}
        schedule = {"lr_type": self.config.lr_type, "last_epoch": self.epoch - 1, "last_lr": self.last_lr()}
        return {
            "epoch": self.epoch,
            "model": self.config.model,
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
            "metadata": self.network.metadata.to_plain(),
            "progress": self.progress(self.step),
            "settings": run_settings(self.config),
            "random_state": random_state(),
            "versions": versions(),
        }

    def progress(self, step: int) -> float:
        """How much of the training is done after some steps of this epoch, 0 to 1."""
        steps = len(self.loaders.train or ())
        return (self.epoch + step / max(1, steps)) / self.config.epochs

    def last_lr(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def is_best(self) -> bool:
        """Whether the last epoch is the best so far."""
        return best_row(self.history) is self.history[-1]

    def run_epoch(self) -> None:
        """Train what is left of an epoch, evaluate it, and enter it in the history. Saves within the epoch if due."""
        c, epoch = self.config, self.epoch
        lr = lr_at(
            epoch,
            lr=c.lr,
            epochs=c.epochs,
            lr_type=c.lr_type,
            lr_decay_step=c.lr_decay_step,
            warm_up=c.warm_up,
            warm_up_epochs=c.warm_up_epochs,
        )
        tau = tau_at(epoch, epochs=c.epochs, tau_min=c.tau_min, tau_max=c.tau_max) if c.regularizer else 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loader = self.loaders.train
        assert loader is not None
        loader.replaced = self.partial.pop("replaced", 0) if self.processes.main else 0
        totals = Totals(loader.device, f"epoch {epoch + 1}", **(self.partial if self.processes.main else {}))
        train = self._train(loader, epoch, tau, totals)
        all_reduce_buffers(self.network)
        check_finite(self.network, f"at the end of epoch {epoch + 1}")
        if self.processes.size > 1:  # if one process cannot read a test image, the others hear of it too late to save
            self._save_within(len(loader), totals)
        try:
            test = self._evaluate(epoch)
        except UsageError as error:  # an image that cannot be read
            if self.processes.size == 1:
                self._save_within(len(loader), totals)
            raise UsageError(f"{error}; the epoch's training is kept: mend the data and go on with --resume") from error
        quantization = quantization_error(self.network)
        columns = metric_columns("train", train) | {"train_replaced": self._replaced()} | metric_columns("test", test)
        self.history.append(
            {"epoch": epoch + 1, "lr": lr, "tau": tau, **columns, "qe": quantization.qe, "b": quantization.b}
        )
        self.epoch, self.step, self.partial = epoch + 1, 0, {}

    def _train(self, loader: Loader, epoch: int, tau: float, totals: Totals) -> Metrics:
        c, regularizer = self.config, self.fast.regularizer
        with Progress(f"epoch {epoch + 1}/{c.epochs}", len(loader), c.print_freq, self.step) as progress:
            return train_one_epoch(
                self.model,
                loader,
                self.optimizer,
                epoch=epoch,
                tau=tau,
                watcher=progress,
                regularizer=opposite(regularizer) if c.regularizer_form == "cos2" else regularizer,
                totals=totals,
                first_step=self.step,
                after_step=self._save_if_due,
            )

    def _save_if_due(self, step: int, totals: Totals) -> None:
        minutes = self.config.checkpoint_minutes
        if minutes and broadcast_decision(time.monotonic() - self.saved_at >= 60 * minutes):
            self._save_within(step, totals)

    def _save_within(self, step: int, totals: Totals) -> None:
        sums, count = totals.over_processes()
        all_reduce_buffers(self.network)
        check_finite(self.network, f"after step {step} of epoch {self.epoch + 1}")
        self.step, self.partial = step, {"sums": sums, "count": count, "replaced": self._replaced()}
        self.save()

    def _replaced(self) -> int:
        """Damaged images of this epoch for which others were taken, over all processes."""
        assert self.loaders.train is not None
        return int(all_reduce_sum(torch.tensor(self.loaders.train.replaced)).item())

    def save(self) -> None:
        """Write the latest checkpoint, in the first process alone."""
        if self.processes.main:
            save_checkpoint(self.contents(), self.folder / LATEST)
        self.saved_at = time.monotonic()

    def _evaluate(self, epoch: int) -> Metrics:
        c, loader = self.config, self.loaders.test
        model = self.fast if self.processes.size > 1 else self.model
        with Progress(f"epoch {epoch + 1}/{c.epochs} test", len(loader), c.print_freq) as progress:
            return evaluate(model, loader, progress, f"the evaluation after epoch {epoch + 1}")
