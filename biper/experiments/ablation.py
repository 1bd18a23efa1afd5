"""Train the variants of studies over seeds, and tell what they came to: tables, pictures and the logs of all runs."""

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from biper.checkpoint import load_checkpoint
from biper.experiments.experiment import Experiment
from biper.experiments.runs import Run, run_stages, write_metrics
from biper.experiments.studies import Study, Variant, studies
from biper.experiments.tables import Sample, markdown, write_csv, write_text
from biper.plots import Lines, draw_bars, draw_lines, picture
from biper.quantization import LayerError, QuantizationError, quantization_error

log = logging.getLogger("biper")


@dataclass(frozen=True)
class Outcome:
    """What a variant came to with one seed, by stage."""

    runs: Mapping[int, Run]
    errors: Mapping[int, QuantizationError]  # of the best epoch


Outcomes = Mapping[str, Mapping[int, Outcome]]  # by the variant's title and the seed
QUANTITIES: Mapping[str, tuple[int, Callable[[Run, QuantizationError], float]]] = {  # with the digits that are shown
    "top-1 (%)": (2, lambda run, error: float(run.best["test_top1"])),
    "QE": (3, lambda run, error: error.qe),
    "squared error": (3, lambda run, error: error.squared),
    "freq·std(w)": (3, lambda run, error: statistics.fmean(layer.freq_std for layer in error.layers)),
}
EXPLAINED = """top-1 is that of the best epoch on the test images; QE the published quantization error, summed over the
layers; squared error that with each layer's best scale, summed likewise; freq·std(w) the mean over the layers. The
difference is that of stage 2's top-1 from `{base}`, seed by seed. ± is the standard deviation over the seeds."""


def ablate(experiment: Experiment, names: Sequence[str]) -> None:
    """Train what is missing, seed by seed, and write the tables and pictures of the named studies into its folder.

    They are written as soon as there is something new to tell. What is in the folder already is not trained again, and
    an interrupted run goes on.
    """
    recipe, folder = experiment.recipe, experiment.folder
    experiment.announce()
    chosen = [studies(recipe)[name] for name in names]
    found: dict[str, dict[str, dict[int, Outcome]]] = {s.name: {v.title: {} for v in s.variants} for s in chosen}
    for seed in experiment.seeds:
        for study in chosen:
            for variant in study.variants:
                log.info("== %s: %s, seed %d", study.name, variant.title, seed)
                found[study.name][variant.title][seed] = trained(recipe.family, variant, seed, folder)
            write_study(study, found[study.name], folder, experiment.preface())
            write_logs(found, folder)


def trained(family: str, variant: Variant, seed: int, folder: Path) -> Outcome:
    """A variant's stages of one seed."""
    folders = {s: folder / "runs" / key / f"seed{seed}" / f"stage{s}" for s, (key, _) in variant.stages.items()}
    runs = run_stages(family, {s: settings for s, (_, settings) in variant.stages.items()}, seed, folders)
    return Outcome(runs, {s: quantization_error(load_checkpoint(run.checkpoint)) for s, run in runs.items()})


def samples(outcomes: Mapping[int, Outcome]) -> dict[tuple[int, str], Sample]:
    """A variant's quantities over its seeds, by stage and name."""
    stages = next(iter(outcomes.values())).runs
    return {
        (stage, name): Sample(tuple(measure(o.runs[stage], o.errors[stage]) for o in outcomes.values()), digits)
        for stage in stages
        for name, (digits, measure) in QUANTITIES.items()
    }


def write_study(study: Study, outcomes: Outcomes, folder: Path, preface: str) -> None:
    """A study's table as Markdown and CSV, and its picture."""
    found = {title: samples(by_seed) for title, by_seed in outcomes.items()}
    seeds = list(outcomes[study.base])
    rows = [
        [title, stage, name, len(seeds), sample.mean, sample.std, *sample.values]
        for title, measured in found.items()
        for (stage, name), sample in measured.items()
    ]
    head = ["variant", "stage", "quantity", "n", "mean", "std", *(f"seed_{seed}" for seed in seeds)]
    write_csv(head, rows, folder / f"{study.name}.csv")
    parts = [f"# {study.question}", preface, _table(study, found), EXPLAINED.format(base=study.base)]
    if study.name == "frequency":
        parts += ["freq·std(w) after stage 1, layer by layer, mean over the seeds:", _layer_table(outcomes)]
    write_text("\n\n".join([*parts, f"![]({study.name}.png)"]), folder / f"{study.name}.md")
    draw = _draw_frequency if study.name == "frequency" else _draw_variants
    draw(outcomes, folder / f"{study.name}.png")
    log.info("wrote %s with its .csv and .png", folder / f"{study.name}.md")


def _table(study: Study, found: Mapping[str, Mapping[tuple[int, str], Sample]]) -> str:
    last = (2, "top-1 (%)")
    columns = [(stage, name) for name in QUANTITIES for stage in (1, 2)]
    base = found[study.base][last].values
    rows = []
    for title, measured in found.items():
        gap = Sample(tuple(a - b for a, b in zip(measured[last].values, base, strict=True)))
        cells = [str(measured.get(column, "-")) for column in columns]
        rows.append(
            [title, *cells[:2], "" if title == study.base else f"{'+' if gap.mean > 0 else ''}{gap}", *cells[2:]]
        )
    heads = [f"stage {stage}: {name}" for stage, name in columns]
    return markdown(["", *heads[:2], "difference", *heads[2:]], rows)


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
    freqs = [next(iter(by_seed.values())).runs[1].config.freq for by_seed in outcomes.values()]
    found = [samples(by_seed) for by_seed in outcomes.values()]

    def over_freq(stage: int, name: str) -> Lines:
        lines = zip(*(measured[stage, name].values for measured in found), strict=True)
        return [(f"{name}, stage {stage}", [(freqs, line) for line in lines])]

    layers = [(title, [(range(1, 1 + len(m := _layer_means(s))), list(m.values()))]) for title, s in outcomes.items()]
    with picture(path, 1, 3, 4.8, 3.6) as (_, axes):
        left, middle, right = axes[0]
        accuracy = [*over_freq(1, "top-1 (%)"), *over_freq(2, "top-1 (%)")]
        draw_lines(left, accuracy, xlabel="freq", ylabel="top-1 (%)", title="accuracy")
        errors = [line for name in ("QE", "squared error") for stage in (1, 2) for line in over_freq(stage, name)]
        draw_lines(middle, errors, xlabel="freq", ylabel="sum over the layers", title="quantization error")
        draw_lines(
            right,
            layers,
            xlabel="layer",
            ylabel="freq·std(w)",
            title="spread of the weights after stage 1",
            yscale="log",
        )


def _draw_variants(outcomes: Outcomes, path: Path) -> None:
    """Accuracy over the epochs, and the errors at the end."""
    curves = {title: [_curve(outcome) for outcome in by_seed.values()] for title, by_seed in outcomes.items()}
    end = max(len(curve) for seeds in curves.values() for curve in seeds)
    lines = [
        (title, [(range(end - len(curve) + 1, end + 1), curve) for curve in seeds]) for title, seeds in curves.items()
    ]
    found = [samples(by_seed) for by_seed in outcomes.values()]
    with picture(path, 1, 2, 5.5, 3.8) as (_, axes):
        draw_lines(axes[0, 0], lines, xlabel="epoch, both stages", ylabel="test top-1 (%)", title="accuracy")
        groups = [(name, [measured[2, name].mean for measured in found]) for name in ("QE", "squared error")]
        draw_bars(axes[0, 1], list(outcomes), groups, "quantization error after stage 2")


def _curve(outcome: Outcome) -> list[float]:
    return [row["test_top1"] for run in outcome.runs.values() for row in run.history]


def write_logs(found: Mapping[str, Outcomes], folder: Path) -> None:
    """metrics.csv: every epoch of every run, once; layers.csv: every layer's quantization error after each of them."""
    runs: dict[Path, tuple[dict[str, str | int], Run, QuantizationError]] = {}
    for outcomes in found.values():
        for by_seed in outcomes.values():
            for seed, outcome in by_seed.items():
                for stage, run in outcome.runs.items():
                    labels: dict[str, str | int] = {"run": run.folder.parent.parent.name, "seed": seed}
                    runs[run.folder] = (labels, run, outcome.errors[stage])
    write_metrics([(labels, run) for labels, run, _ in runs.values()], folder / "metrics.csv")
    rows = [
        [*labels.values(), run.config.stage, *astuple(layer)]
        for labels, run, error in runs.values()
        for layer in error.layers
    ]
    write_csv(["run", "seed", "stage", *(f.name for f in fields(LayerError))], rows, folder / "layers.csv")
