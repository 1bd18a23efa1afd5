"""A recipe over seeds: both stages, evaluation, packed files, model cards, and the table that sums it up."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from biper.checkpoint import load_checkpoint
from biper.experiments.card import model_card
from biper.experiments.experiment import Experiment
from biper.experiments.release import Result, release
from biper.experiments.runs import Run, run_stages, write_metrics
from biper.experiments.tables import Sample, markdown, write_csv, write_text
from biper.plots import draw_lines, picture, plot_quantization_error

log = logging.getLogger("biper")
RELEASE = "release"  # the folder of what is given away, in a seed's
QUANTITIES = {  # of Result, with what they are called and the digits that are shown
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

    They tell of the seeds that are done. What is there already is not done again, and an interrupted run goes on.
    """
    recipe = experiment.recipe
    experiment.announce()
    runs: dict[int, Mapping[int, Run]] = {}
    results = []
    for seed in experiment.seeds:
        log.info("== %s, seed %d", recipe.model, seed)
        home = experiment.folder / f"seed{seed}"
        folders = {stage: home / f"stage{stage}" for stage in (1, 2)}
        runs[seed] = run_stages(recipe.family, {1: recipe.stage1, 2: recipe.stage2}, seed, folders)
        results.append(release(runs[seed], home / RELEASE, experiment.settings))
        write_metrics([({}, run) for run in runs[seed].values()], home / RELEASE / "metrics.csv")
        write_text(model_card(experiment, results[-1], runs[seed]), home / RELEASE / "README.md")
        write_report(experiment, runs, results)


def write_report(experiment: Experiment, runs: Mapping[int, Mapping[int, Run]], results: Sequence[Result]) -> None:
    """Logs, pictures and tables of the seeds that are done; the quantization error is drawn of the first one's."""
    folder = experiment.folder
    labelled = [({"seed": seed}, run) for seed, stages in runs.items() for run in stages.values()]
    write_metrics(labelled, folder / "metrics.csv")
    draw_learning_curves(runs, folder / "learning_curves.png")
    best = [(f"stage {stage}", load_checkpoint(run.checkpoint)) for stage, run in runs[experiment.seeds[0]].items()]
    plot_quantization_error(best, folder / "quantization_error.png")
    write_table(experiment, results, folder)


def write_table(experiment: Experiment, results: Sequence[Result], folder: Path) -> None:
    """results.md and results.csv: mean, standard deviation, n, what is published, and every seed's value."""
    samples = {
        name: Sample(tuple(getattr(result, name) for result in results), digits)
        for name, (_, digits) in QUANTITIES.items()
    }
    known = {"stage2_top1": experiment.published_top1}
    head = ["quantity", "mean", "std", "n", "published", *(f"seed_{result.seed}" for result in results)]
    rows = [[name, s.mean, s.std, len(s.values), known.get(name), *s.values] for name, s in samples.items()]
    write_csv(head, rows, folder / "results.csv")
    summary = [
        [QUANTITIES[name][0], s.number(s.mean), s.number(s.std), str(len(s.values)), s.number(known.get(name))]
        for name, s in samples.items()
    ]
    seeds = [[f"seed {r.seed}", *(s.number(s.values[i]) for s in samples.values())] for i, r in enumerate(results)]
    summed_up = markdown(["", "mean", "std", "n", f"published ({experiment.published_epochs} epochs)"], summary)
    parts = [
        f"# {experiment.recipe.model} on {experiment.data}",
        experiment.preface(),
        summed_up,
        "The best epoch is chosen on the test images, as in the published code; the last one is not chosen.",
        markdown(["", *samples], seeds),
        f"Machine: {results[0].machine}. Versions: {results[0].versions_text()}.",
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
