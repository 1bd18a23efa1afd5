"""What an experiment came to: the tables of a recipe and of a study as Markdown and CSV, and their pictures."""

import logging
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biper.experiments.plan import Experiment, epochs_text
from biper.experiments.plots import Lines, draw_bars, draw_lines, draw_weights, picture, plot_quantization_error
from biper.experiments.release import Result
from biper.experiments.run import Run
from biper.experiments.studies import Study
from biper.experiments.tables import Sample, markdown
from biper.files import write_rows, write_text
from biper.models.checkpoint import load_checkpoint
from biper.nn.quantization_error import QuantizationError

log = logging.getLogger("biper")
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


def epoch_rows(stages: Mapping[int, Run], **labels: int) -> list[dict[str, Any]]:
    """metrics.csv of both stages as one, a row an epoch."""
    return [{**labels, "stage": stage, **row} for stage, run in stages.items() for row in run.history]


def report_recipe(experiment: Experiment, runs: Mapping[int, Mapping[int, Run]], results: Mapping[int, Result]) -> None:
    """Logs, pictures and tables of the seeds that are done; the quantization error is drawn of the first one's."""
    folder = experiment.folder
    write_rows([row for seed, stages in runs.items() for row in epoch_rows(stages, seed=seed)], folder / "metrics.csv")
    _draw_learning_curves(runs, folder / "learning_curves.png")
    seed, first = next(iter(runs.items()))
    best = [(f"seed {seed}, stage {stage}", load_checkpoint(run.checkpoint)) for stage, run in first.items()]
    plot_quantization_error(best, folder / "quantization_error.png")
    _write_results(experiment, results, folder)


def _write_results(experiment: Experiment, results: Mapping[int, Result], folder: Path) -> None:
    """results.md and results.csv: mean, standard deviation, n, what is published, and every seed's value."""
    samples = {
        name: Sample({seed: getattr(result, name) for seed, result in results.items()}, digits)
        for name, (_, digits) in QUANTITIES.items()
    }
    known = {"stage2_top1": experiment.published_top1}
    epochs = {"epochs": epochs_text(experiment.recipe.epochs), "published_epochs": experiment.published_epochs}
    rows = [
        {"quantity": name, **s.columns(list(results)), "published": known.get(name), **epochs}
        for name, s in samples.items()
    ]
    write_rows(rows, folder / "results.csv")
    summary = [
        [QUANTITIES[name][0], s.number(s.mean), s.number(s.std), str(s.n), s.number(known.get(name))]
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


def _draw_learning_curves(runs: Mapping[int, Mapping[int, Run]], path: Path) -> None:
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


@dataclass(frozen=True)
class Outcome:
    """What a variant came to with one seed, by stage."""

    runs: Mapping[int, Run]
    errors: Mapping[int, QuantizationError]  # of the best epoch


Outcomes = Mapping[str, Mapping[int, Outcome]]  # by the variant's title and the seed
Samples = Mapping[tuple[int, str], Sample]  # by the stage and the quantity's name
TOP1, LAST, RELATIVE = "top-1 (%)", "last top-1 (%)", "relative error"
MEASURES: Mapping[str, tuple[int, Callable[[Run, QuantizationError], float]]] = {  # with the digits that are shown
    TOP1: (2, lambda run, error: float(run.best["test_top1"])),
    LAST: (2, lambda run, error: float(run.last["test_top1"])),
    "QE": (3, lambda run, error: error.qe),
    "squared error": (3, lambda run, error: error.squared),
    RELATIVE: (3, lambda run, error: error.relative),
    "freq·std(w)": (3, lambda run, error: statistics.fmean(layer.freq_std for layer in error.layers)),
}
EXPLAINED = """top-1 is that of the best epoch on the images it is measured on, the last one's is not chosen. QE is the
published quantization error, summed over the layers; where weights are no sin(freq·w), that of the real weights that
become binary from those that take their place. Squared error is that with each layer's best scale, summed likewise;
relative error that as a share of the mean square, mean over the layers: it has no unit, and can be compared between
quantizers. freq·std(w) is the mean over the layers. The difference is that of stage 2's top-1 from `{base}`, seed by
seed. ± is the standard deviation over the seeds."""


def samples(outcomes: Mapping[int, Outcome]) -> Samples:
    """A variant's quantities over its seeds."""
    stages = next(iter(outcomes.values())).runs
    return {
        (stage, name): Sample({seed: measure(o.runs[stage], o.errors[stage]) for seed, o in outcomes.items()}, digits)
        for stage in stages
        for name, (digits, measure) in MEASURES.items()
    }


def report_study(name: str, study: Study, outcomes: Outcomes, folder: Path, preface: str) -> None:
    """A study's table as Markdown and CSV, and its picture, of the variants that have come to something."""
    outcomes = {title: by_seed for title, by_seed in outcomes.items() if by_seed}
    if not outcomes:
        return
    found = {title: samples(by_seed) for title, by_seed in outcomes.items()}
    seeds = sorted({seed for by_seed in outcomes.values() for seed in by_seed})
    rows = [
        {"variant": title, "stage": stage, "quantity": quantity, **sample.columns(seeds)}
        for title, measured in found.items()
        for (stage, quantity), sample in measured.items()
    ]
    write_rows(rows, folder / f"{name}.csv")
    parts = [f"# {study.question}", preface, _table(study, found), EXPLAINED.format(base=study.base)]
    if study.over_freq:
        parts += ["freq·std(w) after stage 1, layer by layer, mean over the seeds:", _layer_table(outcomes)]
    write_text("\n\n".join([*parts, f"![]({name}.png)"]), folder / f"{name}.md")
    if study.over_freq:
        _draw_frequency(outcomes, folder / f"{name}.png")
    else:
        _draw_variants(outcomes, folder / f"{name}.png", study.histograms)
    log.info("wrote %s with its .csv and .png", folder / f"{name}.md")


def _table(study: Study, found: Mapping[str, Samples]) -> str:
    others = [(stage, name) for name in MEASURES if name not in (TOP1, LAST) for stage in (1, 2)]
    columns = [(1, TOP1), (2, TOP1), (2, LAST), *others]
    heads = [f"stage {stage}: {name}" for stage, name in columns]
    rows = []
    for title, measured in found.items():
        cells = [str(measured.get(column, "-")) for column in columns]
        rows.append([title, str(measured[2, TOP1].n), *cells[:2], _gap(study, found, title), *cells[2:]])
    return markdown(["", "n", *heads[:2], "difference", *heads[2:]], rows)


def _gap(study: Study, found: Mapping[str, Samples], title: str) -> str:
    """How far a variant is from the study's base, over the seeds that both have."""
    own, base = (found[name][2, TOP1].values if name in found else {} for name in (title, study.base))
    gap = Sample({seed: own[seed] - base[seed] for seed in own if seed in base})
    if title == study.base or not gap.values:
        return ""
    return f"{'+' if gap.mean > 0 else ''}{gap}"


def _layer_table(outcomes: Outcomes) -> str:
    stds = {title: _layer_means(by_seed) for title, by_seed in outcomes.items()}
    names = next(iter(stds.values()))
    return markdown(["layer", *stds], [[name, *(f"{means[name]:.3f}" for means in stds.values())] for name in names])


def _layer_means(by_seed: Mapping[int, Outcome]) -> dict[str, float]:
    """freq*std(w) after stage 1, by layer, mean over the seeds."""
    layers = zip(*(outcome.errors[1].layers for outcome in by_seed.values()), strict=True)
    return {same[0].name: statistics.fmean(layer.freq_std for layer in same) for same in layers}


def _draw_frequency(outcomes: Outcomes, path: Path) -> None:
    """Accuracy and errors over the frequency, and freq*std(w) over the layers."""
    freqs = {title: next(iter(by_seed.values())).runs[1].config.freq for title, by_seed in outcomes.items()}
    found = {title: samples(by_seed) for title, by_seed in outcomes.items()}
    seeds = sorted({seed for by_seed in outcomes.values() for seed in by_seed})

    def over_freq(stage: int, name: str) -> Lines:
        lines = []
        for seed in seeds:
            titles = [title for title in outcomes if seed in outcomes[title]]
            lines.append(([freqs[t] for t in titles], [found[t][stage, name].values[seed] for t in titles]))
        return [(f"{name}, stage {stage}", lines)]

    layers = [(title, [(range(1, 1 + len(m := _layer_means(s))), list(m.values()))]) for title, s in outcomes.items()]
    with picture(path, 1, 3, 4.8, 3.6) as (_, axes):
        left, middle, right = axes[0]
        accuracy = [*over_freq(1, TOP1), *over_freq(2, TOP1)]
        draw_lines(left, accuracy, xlabel="freq", ylabel=TOP1, title="accuracy")
        errors = [line for name in ("QE", "squared error") for stage in (1, 2) for line in over_freq(stage, name)]
        draw_lines(middle, errors, xlabel="freq", ylabel="sum over the layers", title="quantization error")
        draw_lines(right, layers, xlabel="layer", ylabel="freq·std(w)", title="spread after stage 1", yscale="log")


def _draw_variants(outcomes: Outcomes, path: Path, histograms: bool) -> None:
    """Accuracy over the epochs, the errors at the end, and if wanted where the weights lie then, of the first seed."""
    curves = {title: [_curve(outcome) for outcome in by_seed.values()] for title, by_seed in outcomes.items()}
    end = max(len(curve) for seeds in curves.values() for curve in seeds)
    lines = [
        (title, [(range(end - len(curve) + 1, end + 1), curve) for curve in seeds]) for title, seeds in curves.items()
    ]
    found = [samples(by_seed) for by_seed in outcomes.values()]
    with picture(path, 1, 3 if histograms else 2, 5.5, 3.8) as (_, axes):
        draw_lines(axes[0, 0], lines, xlabel="epoch, both stages", ylabel=TOP1, title="accuracy")
        errors = (RELATIVE,) if histograms else ("QE", "squared error")  # quantizers have units of their own
        groups = [(name, [measured[2, name].mean for measured in found]) for name in errors]
        draw_bars(axes[0, 1], list(outcomes), groups, "quantization error after stage 2")
        if histograms:
            first = {title: next(iter(by_seed.values())).runs[2] for title, by_seed in outcomes.items()}
            draw_weights(axes[0, 2], {title: load_checkpoint(run.checkpoint) for title, run in first.items()})


def _curve(outcome: Outcome) -> list[float]:
    return [row["test_top1"] for run in outcome.runs.values() for row in run.history]
