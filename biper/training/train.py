"""One stage of training, from its settings to its best checkpoint."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from biper.errors import TrainingDiverged, UsageError
from biper.training.checkpoint import BEST, LATEST, publish_best
from biper.training.distributed import Processes, joined
from biper.training.log import Clock, Recorder
from biper.training.process import describe_devices, name_out_of_memory
from biper.training.run_folder import write_settings
from biper.training.settings import Settings
from biper.training.trainer import Stage, best_row

log = logging.getLogger("biper")
ALONE = Processes()


@name_out_of_memory()
def train(config: Settings, processes: Processes = ALONE) -> Path:
    """Run a stage to its end, with the other processes if there are any, and return the path of its best checkpoint.

    Raises UsageError before anything is written if the settings, the data or the folder are unfit, and
    TrainingDiverged, with the last good checkpoint in place, if the loss is no longer finite.
    """
    with joined(processes):
        stage = Stage(config, processes)
        try:
            _run(stage)
        except TrainingDiverged as error:
            place = f"step {stage.step} of epoch {stage.epoch + 1}" if stage.step else f"epoch {stage.epoch}"
            kept = f"the last good checkpoint, of {place}, is {stage.folder / LATEST}"
            kept = kept if stage.history or stage.step else "no epoch was saved yet"
            advice = "start again with a smaller --lr and another --save"
            raise TrainingDiverged(f"{error}; {kept}; {advice}") from error
        except BrokenPipeError:  # of standard output
            raise
        except OSError as error:
            raise UsageError(f"cannot write to {stage.folder}: {error}; what was saved before is intact") from error
        return stage.folder / BEST


def _run(stage: Stage) -> None:
    if not stage.processes.main:
        run_epochs(stage, None)
        return
    stage.folder.mkdir(parents=True, exist_ok=True)
    with Recorder(stage.folder, stage.epoch) as recorder:
        announce(stage)
        write_settings(stage.config, stage.folder)
        if stage.history:  # a run that was killed between two of its files gets the missing one
            if stage.is_best() and not stage.step:
                publish_best(stage.folder)
            recorder.metrics(stage.history)  # last, as after every epoch: where they are whole, all is
        run_epochs(stage, recorder)
        best = best_row(stage.history)
        numbers = f"top-1 {best['test_top1']:.2f} %, top-5 {best['test_top5']:.2f} %"
        log.info("best %s (epoch %d): %s", numbers, best["epoch"], stage.folder / BEST)


def run_epochs(stage: Stage, recorder: Recorder | None) -> None:
    """The epochs that are left, each saved as soon as it is over; the process without a recorder writes nothing."""
    config = stage.config
    clock = Clock(config.epochs - stage.epoch)
    while stage.epoch < config.epochs:
        stage.run_epoch()
        stage.save()
        if recorder is None:
            continue
        if stage.is_best():
            publish_best(stage.folder)
        row = stage.history[-1]
        seconds, finish = clock.tick()
        recorder.metrics(stage.history)
        recorder.epoch(row, stage.network, seconds)
        expected = f"  finish {finish:%d %b %H:%M}" if config.time_estimate else ""
        replaced = f"  {row['train_replaced']} damaged images replaced" if row["train_replaced"] else ""
        log.info("%s  %.1f s%s%s", describe(row, config), seconds, replaced, expected)


def describe(row: Mapping[str, Any], config: Settings) -> str:
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
    log.info("BiPer stage %d: %s, %s, %s parameters", m.stage, m.model, m.quantizer_text, f"{parameters:,}")
    images = f"{stage.loaders.train.count:,} training and {stage.loaders.test.count:,} test images"
    log.info("%s: %s of %dx%d, %d classes", m.dataset, images, m.image_size, m.image_size, m.num_classes)
    together = f", {p} processes" if (p := stage.processes.size) > 1 else ""
    log.info("on %s%s: %s", describe_devices(stage.devices), together, stage.fast.describe())
    if c.use_dali and stage.loaders.in_memory:
        log.info("--use_dali has no effect: the images are held in memory")
    if c.stage == 2:
        log.info("starting from %s", "fresh weights" if c.from_scratch else f"stage 1: {c.load_ckpt_stage1}")
    if c.resume:
        place = f"going on after {stage.epoch} of {c.epochs} epochs" + (
            f" and {stage.step} steps" if stage.step else ""
        )
        log.info("--resume: %s", place if stage.history or stage.step else "nothing saved yet, starting fresh")
    log.info("results in %s", stage.folder)
