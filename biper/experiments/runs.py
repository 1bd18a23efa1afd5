"""Runs of experiments: trained unless they are there already, and what they leave to tell."""

import csv
import logging
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biper.checkpoint import BEST, LATEST, read_checkpoint, replaced
from biper.config import Config
from biper.experiments.recipe import Settings
from biper.record import LOG_FILE, METRICS_FILE
from biper.resolve import training_config
from biper.results import read_settings, run_folder
from biper.stage import History, best_row
from biper.train import train

log = logging.getLogger("biper")
SECONDS = re.compile(r" epoch (\d+)/.*  ([\d.]+) s(?:  |$)")  # of a finished epoch, in train.run_epochs's words


@dataclass(frozen=True)
class Run:
    """A finished stage."""

    config: Config
    history: History  # a row an epoch

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return run_folder(self.config)

    @property
    def checkpoint(self) -> Path:
        """Its best epoch's."""
        return self.folder / BEST

    @property
    def best(self) -> dict[str, Any]:
        """The row of its best epoch."""
        return best_row(self.history)

    def seconds_per_epoch(self) -> float:
        """The median over its epochs, as logged: one that was slowed down does not count. NaN without a log."""
        file = self.folder / LOG_FILE
        lines = file.read_text(errors="replace").splitlines() if file.exists() else []
        found = {match[1]: float(match[2]) for match in map(SECONDS.search, lines) if match}
        return statistics.median(found.values()) if found else math.nan


def run(family: str, stage: int, settings: Settings, folder: Path) -> Run:
    """Train a stage in a folder, from where it was interrupted if it was; not if it is there already.

    Raises UsageError for unfit settings, or if the folder holds a run of others.
    """
    given = {**settings, "results_dir": str(folder), "resume": True}
    if stage == 2 and (folder / LATEST).exists():  # which starts from nowhere any more; the folders may have moved
        given["load_ckpt_stage1"] = read_settings(folder, stage)["load_ckpt_stage1"]
    config = training_config(family, stage, given)
    if _finished(config):
        log.info("%s is there already", folder)
    else:
        train(config)
    history: History = read_checkpoint(folder / LATEST)["history"]
    return Run(config, history)


def _finished(config: Config) -> bool:
    folder = run_folder(config)
    if not (folder / BEST).exists() or not (folder / METRICS_FILE).exists():
        return False
    with (folder / METRICS_FILE).open(newline="") as file:
        return len(list(csv.reader(file))) == config.epochs + 1


def write_metrics(runs: Iterable[tuple[Settings, Run]], path: Path) -> None:
    """The metrics.csv of several runs as one, a row an epoch, each run's behind its labels."""
    rows = [{**labels, "stage": run.config.stage, **row} for labels, run in runs for row in run.history]
    names = dict.fromkeys(name for row in rows for name in row)
    with replaced(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(rows)


def run_stages(family: str, settings: dict[int, Settings], seed: int, folders: dict[int, Path]) -> dict[int, Run]:
    """The stages of one seed, by number; stage 2 starts from stage 1's best epoch if there is a stage 1."""
    runs: dict[int, Run] = {}
    for stage, chosen in sorted(settings.items()):
        given = {**chosen, "seed": seed}
        if 1 in runs:
            given["load_ckpt_stage1"] = str(runs[1].checkpoint)
        runs[stage] = run(family, stage, given, folders[stage])
    return runs
