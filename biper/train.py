"""One stage of training, from its settings to its best checkpoint."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from biper.checkpoint import (
    BEST,
    FORMAT,
    LATEST,
    load_checkpoint,
    own_metadata,
    publish_best,
    read_checkpoint,
    rebuild,
    save_checkpoint,
    saved_metadata,
    versions,
)
from biper.config import Config
from biper.data import Loaders, build_loaders, require_same_classes
from biper.engine import evaluate, train_one_epoch
from biper.errors import TrainingDiverged, UsageError
from biper.models import Network, create_model
from biper.optim import build_optimizer
from biper.quantization import quantization_error
from biper.record import Clock, Progress, Recorder, metric_columns
from biper.results import check_folder, run_folder, run_settings, write_settings
from biper.runtime import describe_devices, random_state, seed_everything, select_devices, set_random_state
from biper.schedule import lr_at, tau_at

log = logging.getLogger("biper")
History = list[dict[str, Any]]  # a row an epoch


def initial_network(config: Config, num_classes: int) -> Network:
    """Stage 1: a fresh network. Stage 2: stage 1's network with the square wave switched on (warm start)."""
    if config.stage == 1:
        return create_model(config.model, config.family, num_classes, config.freq, stage=1)
    path = Path(config.load_ckpt_stage1)
    start = load_checkpoint(path, config.freq, model=config.model, family=config.family, stage=1)
    return rebuild(replace(start.metadata, stage=2), start.state_dict(), path)


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


class Stage:
    """A stage under way: its network, its optimizer and its history. Making one writes nothing."""

    def __init__(self, config: Config) -> None:
        self.config = c = config
        self.folder = run_folder(c)
        check_folder(self.folder, c.resume)
        self.devices = select_devices(c.device, c.gpus, c.type)
        seed_everything(c.seed, c.deterministic)
        self.loaders = build_loaders(c, self.devices[0], replicas=len(self.devices))
        latest = self.folder / LATEST
        saved = read_checkpoint(latest) if c.resume and latest.exists() else None
        if saved:
            self.network = rebuild(own_metadata(saved, latest), saved["state_dict"], latest)
        else:
            self.network = initial_network(c, len(self.loaders.classes))
        attach_data(self.network, self.loaders, c.dataset)
        self.network.to(self.devices[0])
        self.model: nn.Module = self.network
        if len(self.devices) > 1:
            self.model = nn.DataParallel(self.network, self.devices)
        self.optimizer = build_optimizer(
            self.network,
            family=c.family,
            name=c.optimizer,
            lr=c.lr,
            momentum=c.momentum,
            weight_decay=c.weight_decay,
        )
        self.history: History = []
        self.epoch = c.start_epoch  # the next one
        if saved:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.history, self.epoch = saved["history"], saved["epoch"]
            set_random_state(saved["random_state"])

    def contents(self, lr: float) -> dict[str, Any]:
        """Everything that a checkpoint holds: the published keys first, then ours."""
        best = best_row(self.history)
        return {
            "epoch": self.epoch,
            "model": self.config.model,
            "state_dict": self.network.state_dict(),
            "best_prec1": best["test_top1"],
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": {"lr_type": self.config.lr_type, "last_epoch": self.epoch - 1, "last_lr": lr},
            "format": FORMAT,
            "best_epoch": best["epoch"],
            "history": self.history,
            "metadata": saved_metadata(self.network.metadata),
            "settings": run_settings(self.config),
            "random_state": random_state(),
            "versions": versions(),
        }

    def is_best(self) -> bool:
        """Whether the last epoch is the best so far."""
        return best_row(self.history) is self.history[-1]

    def run_epoch(self) -> dict[str, Any]:
        """Train one epoch and evaluate it: its row of the history. Changes nothing on disk."""
        c, epoch = self.config, self.epoch
        lr = lr_at(epoch, lr=c.lr, epochs=c.epochs, lr_type=c.lr_type, lr_decay_step=c.lr_decay_step, warm_up=c.warm_up)
        tau = tau_at(epoch, epochs=c.epochs, tau_min=c.tau_min, tau_max=c.tau_max) if c.regularizer else 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loader, title = self.loaders.train, f"epoch {epoch + 1}/{c.epochs}"
        assert loader is not None
        with Progress(title, len(loader), c.print_freq) as progress:
            train = train_one_epoch(self.model, loader, self.optimizer, epoch=epoch, tau=tau, watcher=progress)
        with Progress(f"{title} test", len(self.loaders.test), c.print_freq) as progress:
            test = evaluate(self.model, self.loaders.test, progress, f"the evaluation after epoch {epoch + 1}")
        error = quantization_error(self.network)
        columns = metric_columns("train", train) | metric_columns("test", test)
        return {"epoch": epoch + 1, "lr": lr, "tau": tau, **columns, "qe": error.qe, "b": error.b}


def best_row(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The epoch of the highest top-1, the first of equals."""
    return max(history, key=lambda row: row["test_top1"])


def train(config: Config) -> Path:
    """Run a stage to its end and return the path of its best checkpoint.

    Raises UsageError before anything is written if the settings, the data or the folder are unfit, and
    TrainingDiverged, with the last good checkpoint in place, if the loss is no longer finite.
    """
    stage = Stage(config)
    try:
        stage.folder.mkdir(parents=True, exist_ok=True)
        with Recorder(stage.folder, stage.epoch) as recorder:
            announce(stage)
            write_settings(config, stage.folder)
            if stage.history:  # a run that was killed between two of its files gets the missing one
                recorder.metrics(stage.history)
                if stage.is_best():
                    publish_best(stage.folder)
            run_epochs(stage, recorder)
            best = best_row(stage.history)
            log.info("best top-1 %.2f %% (epoch %d): %s", best["test_top1"], best["epoch"], stage.folder / BEST)
    except TrainingDiverged as error:
        kept = f"the last good checkpoint, of epoch {stage.epoch}, is {stage.folder / LATEST}"
        advice = "start again with a smaller --lr and another --save"
        raise TrainingDiverged(f"{error}; {kept if stage.history else 'no epoch was saved yet'}; {advice}") from error
    except BrokenPipeError:  # of standard output
        raise
    except OSError as error:
        raise UsageError(f"cannot write to {stage.folder}: {error}; what was saved before is intact") from error
    return stage.folder / BEST


def run_epochs(stage: Stage, recorder: Recorder) -> None:
    """The epochs that are left, each saved as soon as it is over."""
    config = stage.config
    clock = Clock(config.epochs - stage.epoch)
    while stage.epoch < config.epochs:
        row = stage.run_epoch()
        stage.history.append(row)
        stage.epoch += 1
        save_checkpoint(stage.contents(row["lr"]), stage.folder / LATEST)
        if stage.is_best():
            publish_best(stage.folder)
        seconds, finish = clock.tick()
        recorder.metrics(stage.history)
        recorder.epoch(row, stage.network, seconds)
        expected = f"  finish {finish:%d %b %H:%M}" if config.time_estimate else ""
        log.info("%s  %.1f s%s", describe(row, config), seconds, expected)


def describe(row: Mapping[str, Any], config: Config) -> str:
    """An epoch in one line."""
    return (
        f"epoch {row['epoch']}/{config.epochs}  lr {row['lr']:.4g}  tau {row['tau']:.4f}"
        f"  train loss {row['train_loss']:.4f} top-1 {row['train_top1']:.2f} %"
        f"  test loss {row['test_loss']:.4f} top-1 {row['test_top1']:.2f} % top-5 {row['test_top5']:.2f} %"
        f"  QE {row['qe']:.3f}"
    )


def announce(stage: Stage) -> None:
    """Say what is about to run."""
    c, m = stage.config, stage.network.metadata
    assert stage.loaders.train is not None
    parameters = sum(p.numel() for p in stage.network.parameters())
    log.info("BiPer stage %d: %s, freq %g, %s parameters", m.stage, m.model, m.freq, f"{parameters:,}")
    images = f"{stage.loaders.train.count:,} training and {stage.loaders.test.count:,} test images"
    log.info("%s: %s of %dx%d, %d classes", m.dataset, images, m.image_size, m.image_size, m.num_classes)
    log.info("on %s", describe_devices(stage.devices))
    if c.use_dali:
        log.info("--use_dali has no effect: the images are held in memory")
    if c.stage == 2:
        log.info("starting from stage 1: %s", c.load_ckpt_stage1)
    if c.resume:
        going_on = f"going on after {stage.epoch} of {c.epochs} epochs"
        log.info("--resume: %s", going_on if stage.history else "nothing saved yet, starting fresh")
    log.info("results in %s", stage.folder)
