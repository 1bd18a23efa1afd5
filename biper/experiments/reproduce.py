"""Conduct a recipe over seeds: both stages, evaluation, packed files, model cards, and the report that sums it up."""

import logging
from collections.abc import Mapping
from pathlib import Path

from biper.errors import TrainingDiverged
from biper.experiments.card import model_card
from biper.experiments.plan import Experiment
from biper.experiments.release import Result, release
from biper.experiments.report import epoch_rows, report_recipe
from biper.experiments.run import Run, conduct, is_there
from biper.files import write_rows, write_text

log = logging.getLogger("biper")
RELEASE = "release"  # the folder of what is given away, in a seed's


def reproduce(experiment: Experiment) -> None:
    """Train, evaluate and pack every seed, and write the table, its CSV and the pictures into the experiment's folder.

    They tell of the seeds that are done, those of earlier commands included. What is there already is not done again,
    and an interrupted run goes on. Seeds that diverge are left out, and named at the end by TrainingDiverged.
    """
    recipe = experiment.recipe
    experiment.require_folder("seed*")
    experiment.announce()
    runs: dict[int, Mapping[int, Run]] = {}
    results: dict[int, Result] = {}
    diverged = []
    there = _seeds_there(experiment.folder)  # they come first: no table loses a seed, other settings are refused early
    seeds = list(dict.fromkeys([*there, *experiment.seeds]))
    for i, seed in enumerate(seeds):
        log.info("== %s, seed %d", recipe.model, seed)
        home = experiment.folder / f"seed{seed}"
        folders = {stage: home / f"stage{stage}" for stage in (1, 2)}
        try:
            runs[seed] = conduct(recipe.family, {1: recipe.stage1, 2: recipe.stage2}, seed, folders)
        except TrainingDiverged as error:
            log.warning("seed %d is left out: %s", seed, error)
            diverged.append(seed)
            continue
        results[seed] = release(runs[seed], home / RELEASE, experiment.data, experiment.command)
        write_rows(epoch_rows(runs[seed]), home / RELEASE / "metrics.csv")
        write_text(model_card(experiment, results[seed], runs[seed]), home / RELEASE / "README.md")
        if i >= len(there) - 1:
            report_recipe(experiment, dict(sorted(runs.items())), dict(sorted(results.items())))
    if diverged:
        raise TrainingDiverged(f"training diverged with the seeds {diverged}: they are not in the tables")


def _seeds_there(folder: Path) -> list[int]:
    """The seeds of which both stages are finished."""
    numbers = [(home, home.name.removeprefix("seed")) for home in folder.glob("seed*")]
    return sorted(
        int(number)
        for home, number in numbers
        if number.isdecimal() and all(is_there(home / f"stage{stage}", stage) for stage in (1, 2))
    )
