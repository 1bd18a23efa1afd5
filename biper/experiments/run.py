"""Runs of experiments: trained unless they are there already, and what they leave to tell."""

import csv
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biper.errors import UsageError
from biper.experiments.recipe import Given
from biper.models.checkpoint import read_checkpoint
from biper.training.checkpoint import BEST, LATEST
from biper.training.inheritance import training_config
from biper.training.log import METRICS_FILE
from biper.training.run_folder import CONFIG_FILE, read_settings, run_folder
from biper.training.settings import Settings
from biper.training.train import train
from biper.training.trainer import History, best_row

log = logging.getLogger("biper")


@dataclass(frozen=True)
class Run:
    """A finished stage."""

    config: Settings
    history: History  # a row an epoch
    seconds: Sequence[float | None]  # of the epochs, as far as the version of biper that trained them kept them

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

    @property
    def last(self) -> dict[str, Any]:
        """The row of its last epoch."""
        return self.history[-1]

    def seconds_per_epoch(self) -> float:
        """The median over its epochs: one that was slowed down does not count. NaN if none of them is known."""
        known = [seconds for seconds in self.seconds if seconds is not None]
        return statistics.median(known) if known else math.nan


def conduct(family: str, settings: Mapping[int, Given], seed: int, folders: Mapping[int, Path]) -> dict[int, Run]:
    """The stages of one seed, by number; stage 2 starts from stage 1's best epoch if there is a stage 1.

    A stage is trained in its folder, from where it was interrupted if it was; not if it is there already. Raises
    UsageError for unfit settings, or if a folder holds a run of others, and TrainingDiverged.
    """
    runs: dict[int, Run] = {}
    for stage, chosen in sorted(settings.items()):
        given = {**chosen, "seed": seed}
        if 1 in runs:
            given["load_ckpt_stage1"] = str(runs[1].checkpoint)
        runs[stage] = _run(family, stage, given, folders[stage])
    return runs


def _run(family: str, stage: int, settings: Given, folder: Path) -> Run:
    given = {**settings, "results_dir": str(folder), "resume": True}
    if (folder / LATEST).exists():
        _keep_paths(given, read_settings(folder, stage), folder)
    else:
        (folder / CONFIG_FILE).unlink(missing_ok=True)  # of a run that was stopped before there was anything to keep
    config = training_config(family, stage, given)
    if _finished(config):
        log.info("%s is there already", folder)
    else:
        train(config)
    contents = read_checkpoint(folder / LATEST)
    if not contents.get("history"):
        raise UsageError(f"{folder / LATEST} is damaged: it has no history of a finished run")
    return Run(config, contents["history"], contents.get("seconds", ()))


def _keep_paths(given: dict[str, Any], stored: Given, folder: Path) -> None:
    """Where a run started from stays what it was when its folder has moved since; other data are worth a line."""
    if "load_ckpt_stage1" in given:
        given["load_ckpt_stage1"] = stored.get("load_ckpt_stage1") or given["load_ckpt_stage1"]
    here = str(Path(given["data_path"]).absolute()) if given.get("data_path") else ""
    if here and stored.get("data_path", "") not in ("", here):
        log.warning("%s was trained on the data in %s, not in %s", folder, stored["data_path"], here)


def _finished(config: Settings) -> bool:
    """Whether a run is whole: metrics.csv is the last file that an epoch writes. Raises UsageError if BEST is gone."""
    folder = run_folder(config)
    rows = logged(folder)
    if rows and not (folder / BEST).exists():
        raise UsageError(f"{folder} has lost its {BEST}: remove the folder, to train it anew")
    return bool(rows) and len(rows) == config.epochs


def is_there(folder: Path, stage: int) -> bool:
    """Whether a folder holds a finished run of a stage."""
    if not (folder / BEST).exists() or not (folder / LATEST).exists():
        return False
    return bool(len(logged(folder)) == read_settings(folder, stage).get("epochs"))


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv; none if it has not got that far."""
    file = folder / METRICS_FILE
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []
