"""One stage of training, from its settings to its best checkpoint."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from biper.errors import TrainingDiverged, UsageError
from biper.training.build import build_trainer
from biper.training.checkpoint import BEST, LATEST, publish_best
from biper.training.distributed import Processes, joined
from biper.training.log import Clock, Recorder
from biper.training.process import describe_devices, name_out_of_memory
from biper.training.run_folder import write_settings
from biper.training.settings import Settings
from biper.training.trainer import Trainer, best_row

log = logging.getLogger("biper")
ALONE = Processes()


@name_out_of_memory()
def train(settings: Settings, processes: Processes = ALONE) -> Path:
    """Run a stage to its end, with the other processes if there are any, and return the path of its best checkpoint.

    Raises UsageError before anything is written if the settings, the data or the folder are unfit, and
    TrainingDiverged, with the last good checkpoint in place, if the loss is no longer finite.
    """
    with joined(processes):
        trainer = build_trainer(settings, processes)
        try:
            _run(trainer)
        except TrainingDiverged as error:
            place = f"step {trainer.step} of epoch {trainer.epoch + 1}" if trainer.step else f"epoch {trainer.epoch}"
            kept = f"the last good checkpoint, of {place}, is {trainer.folder / LATEST}"
            kept = kept if trainer.history or trainer.step else "no epoch was saved yet"
            advice = "start again with a smaller --lr and another --save"
            raise TrainingDiverged(f"{error}; {kept}; {advice}") from error
        except BrokenPipeError:  # of standard output
            raise
        except OSError as error:
            kept = "what was saved before is intact: then go on with --resume"
            kept = kept if (trainer.folder / LATEST).exists() else "it holds no checkpoint: then start again"
            text = f"cannot write to {trainer.folder}: {error}; make room there, or make it writable"
            raise UsageError(f"{text}; {kept}") from error
        return trainer.folder / BEST


def _run(trainer: Trainer) -> None:
    if not trainer.processes.main:
        run_epochs(trainer, None)
        return
    trainer.folder.mkdir(parents=True, exist_ok=True)
    with Recorder(trainer.folder, trainer.epoch, trainer.settings.epochs) as recorder:
        announce(trainer)
        write_settings(trainer.settings, trainer.folder)
        if trainer.history:  # a run that was killed between two of its files gets the missing one
            if trainer.is_best() and not trainer.step:
                publish_best(trainer.folder)
            recorder.metrics(trainer.history)  # last, as after every epoch: where they are whole, all is
        run_epochs(trainer, recorder)
        best = best_row(trainer.history)
        numbers = f"top-1 {best['test_top1']:.2f} %, top-5 {best['test_top5']:.2f} %"
        numbers += " of the held-out images" if trainer.settings.validation else ""
        log.info("best %s (epoch %d): %s", numbers, best["epoch"], trainer.folder / BEST)


def run_epochs(trainer: Trainer, recorder: Recorder | None) -> None:
    """The epochs that are left, each saved as soon as it is over; the process without a recorder writes nothing."""
    settings = trainer.settings
    clock = Clock(settings.epochs - trainer.epoch)
    while trainer.epoch < settings.epochs:
        trainer.run_epoch()
        seconds, finish = clock.tick()
        trainer.seconds.append(seconds)
        trainer.save()
        if recorder is None:
            continue
        if trainer.is_best():
            publish_best(trainer.folder)
        row = trainer.history[-1]
        recorder.metrics(trainer.history)
        recorder.epoch(row, trainer.network, seconds)
        expected = f"  finish {finish:%d %b %H:%M}" if settings.time_estimate else ""
        replaced = f"  {row['train_replaced']} damaged images replaced" if row["train_replaced"] else ""
        log.info("%s  %.1f s%s%s", describe(row, settings), seconds, replaced, expected)


def describe(row: Mapping[str, Any], settings: Settings) -> str:
    """An epoch in one line."""
    evaluated = "validation" if settings.validation else "test"
    return (
        f"epoch {row['epoch']}/{settings.epochs}  lr {row['lr']:.4g}  tau {row['tau']:.4f}"
        f"  train loss {row['train_loss']:.4f} top-1 {row['train_top1']:.2f} %"
        f"  {evaluated} loss {row['test_loss']:.4f} top-1 {row['test_top1']:.2f} % top-5 {row['test_top5']:.2f} %"
        f"  QE {row['qe']:.3f}"
    )


def announce(trainer: Trainer) -> None:
    """Say what is about to run."""
    c, m = trainer.settings, trainer.network.metadata
    assert trainer.loaders.train is not None
    parameters = sum(p.numel() for p in trainer.network.parameters())
    log.info("BiPer stage %d: %s, %s, %s parameters", m.stage, m.model, m.quantizer_text, f"{parameters:,}")
    kind = "held-out training" if c.validation else "test"
    images = f"{trainer.loaders.train.count:,} training and {trainer.loaders.test.count:,} {kind} images"
    log.info("%s: %s of %dx%d, %d classes", m.dataset, images, m.image_size, m.image_size, m.num_classes)
    together = f", {p} processes" if (p := trainer.processes.size) > 1 else ""
    log.info("on %s%s: %s", describe_devices(trainer.devices), together, trainer.describe())
    if c.use_dali and trainer.loaders.in_memory:
        log.info("--use_dali has no effect: the images are held in memory")
    if c.stage == 2:
        log.info("starting from %s", "fresh weights" if c.from_scratch else f"stage 1: {c.load_ckpt_stage1}")
    if c.resume:
        place = f"going on after {trainer.epoch} of {c.epochs} epochs" + (
            f" and {trainer.step} steps" if trainer.step else ""
        )
        if trainer.epoch >= c.epochs:
            place = f"all {c.epochs} epochs are done"
        log.info("--resume: %s", place if trainer.history or trainer.step else "nothing saved yet, starting fresh")
    log.info("results in %s", trainer.folder)
