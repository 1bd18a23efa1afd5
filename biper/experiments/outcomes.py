"""What a study came to: its table as Markdown and CSV, and its picture."""

import logging
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from biper.experiments.plots import Lines, draw_bars, draw_lines, picture
from biper.experiments.run import Run
from biper.experiments.studies import Study
from biper.experiments.tables import Sample, markdown
from biper.files import write_rows, write_text
from biper.nn.quantization_error import QuantizationError

log = logging.getLogger("biper")


@dataclass(frozen=True)
class Outcome:
    """What a variant came to with one seed, by stage."""

    runs: Mapping[int, Run]
    errors: Mapping[int, QuantizationError]  # of the best epoch


Outcomes = Mapping[str, Mapping[int, Outcome]]  # by the variant's title and the seed
Samples = Mapping[tuple[int, str], Sample]  # by the stage and the quantity's name
TOP1, LAST = "top-1 (%)", "last top-1 (%)"
MEASURES: Mapping[str, tuple[int, Callable[[Run, QuantizationError], float]]] = {  # with the digits that are shown
    TOP1: (2, lambda run, error: float(run.best["test_top1"])),
    LAST: (2, lambda run, error: float(run.last["test_top1"])),
    "QE": (3, lambda run, error: error.qe),
    "squared error": (3, lambda run, error: error.squared),
    "freq·std(w)": (3, lambda run, error: statistics.fmean(layer.freq_std for layer in error.layers)),
}
EXPLAINED = """top-1 is that of the best epoch on the test images, the last one's is not chosen. QE is the published
quantization error, summed over the layers; squared error that with each layer's best scale, summed likewise;
freq·std(w) the mean over the layers. The difference is that of stage 2's top-1 from `{base}`, seed by seed. ± is the
standard deviation over the seeds."""


def samples(outcomes: Mapping[int, Outcome]) -> Samples:
    """A variant's quantities over its seeds."""
    stages = next(iter(outcomes.values())).runs
    return {
        (stage, name): Sample({seed: measure(o.runs[stage], o.errors[stage]) for seed, o in outcomes.items()}, digits)
        for stage in stages
        for name, (digits, measure) in MEASURES.items()
    }


def write_study(study: Study, outcomes: Outcomes, folder: Path, preface: str) -> None:
    """A study's table as Markdown and CSV, and its picture, of the variants that have come to something."""
    outcomes = {title: by_seed for title, by_seed in outcomes.items() if by_seed}
    if not outcomes:
        return
    found = {title: samples(by_seed) for title, by_seed in outcomes.items()}
    seeds = sorted({seed for by_seed in outcomes.values() for seed in by_seed})
    head = ["n", "mean", "std", *(f"seed_{seed}" for seed in seeds)]
    rows = [
        {"variant": title, "stage": stage, "quantity": name, **dict(zip(head, sample.row(seeds), strict=True))}
        for title, measured in found.items()
        for (stage, name), sample in measured.items()
    ]
    write_rows(rows, folder / f"{study.name}.csv")
    parts = [f"# {study.question}", preface, _table(study, found), EXPLAINED.format(base=study.base)]
    if study.over_freq:
        parts += ["freq·std(w) after stage 1, layer by layer, mean over the seeds:", _layer_table(outcomes)]
    write_text("\n\n".join([*parts, f"![]({study.name}.png)"]), folder / f"{study.name}.md")
    draw = _draw_frequency if study.over_freq else _draw_variants
    draw(outcomes, folder / f"{study.name}.png")
    log.info("wrote %s with its .csv and .png", folder / f"{study.name}.md")


def _table(study: Study, found: Mapping[str, Samples]) -> str:
    others = [(stage, name) for name in MEASURES if name not in (TOP1, LAST) for stage in (1, 2)]
    columns = [(1, TOP1), (2, TOP1), (2, LAST), *others]
    heads = [f"stage {stage}: {name}" for stage, name in columns]
    rows = []
    for title, measured in found.items():
        cells = [str(measured.get(column, "-")) for column in columns]
        rows.append([title, str(len(measured[2, TOP1].values)), *cells[:2], _gap(study, found, title), *cells[2:]])
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
