"""A recipe over seeds: both stages, evaluation, packed files, model cards, and the table that sums it up."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from biper.errors import TrainingDiverged
from biper.experiments.card import model_card
from biper.experiments.plan import Experiment, epochs_text
from biper.experiments.plots import draw_lines, picture, plot_quantization_error
from biper.experiments.release import Result, release
from biper.experiments.run import Run, conduct, is_there
from biper.experiments.tables import Sample, markdown
from biper.files import write_rows, write_text
from biper.models.checkpoint import load_checkpoint

log = logging.getLogger("biper")
RELEASE = "release"  # the folder of what is given away, in a seed's
QUANTITIES = {  # fields of Result, with what they are called and the digits that are shown
    "stage1_top1": ("stage 1, real weights: best top-1 (%)", 2),
    "stage2_top1": ("stage 2, binary weights: **best top-1 (%)**", 2),
    "stage1_last_top1": ("stage 1: top-1 of the last epoch (%)", 2),
    "stage2_last_top1": ("stage 2: top-1 of the last epoch (%)", 2),
    "float_top1": ("float checkpoint, evaluated: top-1 (%)", 2),
    "packed_top1": ("packed file, evaluated: top-1 (%)", 2),
    "qe": ("quantization error, as published", 3),
    "squared_error": ("squared quantization error, best scales", 3),
    "float_bytes": ("network in float32 (bytes)", 0),
    "packed_bytes": ("packed file (bytes)", 0),
    "stage1_seconds": ("seconds an epoch of stage 1, median", 1),
    "stage2_seconds": ("seconds an epoch of stage 2, median", 1),
}


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
        write_rows(_epochs(runs[seed]), home / RELEASE / "metrics.csv")
        write_text(model_card(experiment, results[seed], runs[seed]), home / RELEASE / "README.md")
        if i >= len(there) - 1:
            write_report(experiment, dict(sorted(runs.items())), dict(sorted(results.items())))
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


def _epochs(stages: Mapping[int, Run], **labels: int) -> list[dict[str, Any]]:
    """metrics.csv of both stages as one, a row an epoch."""
    return [{**labels, "stage": stage, **row} for stage, run in stages.items() for row in run.history]


def write_report(experiment: Experiment, runs: Mapping[int, Mapping[int, Run]], results: Mapping[int, Result]) -> None:
    """Logs, pictures and tables of the seeds that are done; the quantization error is drawn of the first one's."""
    folder = experiment.folder
    write_rows([row for seed, stages in runs.items() for row in _epochs(stages, seed=seed)], folder / "metrics.csv")
    draw_learning_curves(runs, folder / "learning_curves.png")
    seed, first = next(iter(runs.items()))
    best = [(f"seed {seed}, stage {stage}", load_checkpoint(run.checkpoint)) for stage, run in first.items()]
    plot_quantization_error(best, folder / "quantization_error.png")
    write_table(experiment, results, folder)


def write_table(experiment: Experiment, results: Mapping[int, Result], folder: Path) -> None:
    """results.md and results.csv: mean, standard deviation, n, what is published, and every seed's value."""
    samples = {
        name: Sample({seed: getattr(result, name) for seed, result in results.items()}, digits)
        for name, (_, digits) in QUANTITIES.items()
    }
    known = {"stage2_top1": experiment.published_top1}
    head = ["n", "mean", "std", *(f"seed_{seed}" for seed in results)]
    epochs = {"epochs": epochs_text(experiment.recipe.epochs), "published_epochs": experiment.published_epochs}
    rows = [
        {"quantity": name, **dict(zip(head, s.row(list(results)), strict=True)), "published": known.get(name), **epochs}
        for name, s in samples.items()
    ]
    write_rows(rows, folder / "results.csv")
    summary = [
        [QUANTITIES[name][0], s.number(s.mean), s.number(s.std), str(len(s.values)), s.number(known.get(name))]
        for name, s in samples.items()
    ]
    seeds = [[f"seed {seed}", *(s.number(s.values[seed]) for s in samples.values())] for seed in results]
    summed_up = markdown(["", "mean", "std", "n", f"published ({experiment.published_epochs} epochs)"], summary)
    made = dict.fromkeys(f"Machine: {r.machine}. Versions: {r.versions_text()}." for r in results.values())
    parts = [
        f"# {experiment.recipe.model} on {experiment.data}",
        experiment.preface(),
        summed_up,
        "The best epoch is chosen on the test images, as in the published code; the last one is not chosen.",
        markdown(["", *samples], seeds),
        *made,
        "![](learning_curves.png)\n\n![](quantization_error.png)",
    ]
    write_text("\n\n".join(parts), folder / "results.md")
    log.info("\n%s\nwrote %s", summed_up, folder / "results.md")


def draw_learning_curves(runs: Mapping[int, Mapping[int, Run]], path: Path) -> None:
    """Accuracy, loss and quantization error over the epochs, a column a stage; in training and on the test images."""
    panels = (
        ("top-1 (%)", {"training": "train_top1", "test": "test_top1"}),
        ("cross-entropy", {"training": "train_loss", "test": "test_loss"}),
        ("quantization error", {"": "qe"}),
    )
    with picture(path, len(panels), 2, 4.8, 2.8) as (_, axes):
        for column, stage in enumerate((1, 2)):
            histories = [by_stage[stage].history for by_stage in runs.values()]
            for row, (label, columns) in enumerate(panels):
                lines = [
                    (title, [([r["epoch"] for r in history], [r[name] for r in history]) for history in histories])
                    for title, name in columns.items()
                ]
                draw_lines(axes[row, column], lines, xlabel="epoch", ylabel=label)
            axes[0, column].set_title(f"stage {stage}, {('real', 'binary')[column]} weights")
