"""Train the variants of studies over seeds, and keep the logs of all runs."""

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from biper.errors import TrainingDiverged, UsageError
from biper.experiments.choices import recipe_choices
from biper.experiments.parallel import SERIAL, Jobs, Trial, train_beside
from biper.experiments.plan import Experiment
from biper.experiments.report import Outcome, report_study
from biper.experiments.run import conduct, is_there, logged
from biper.experiments.studies import CHOICES, STUDIES, Study, Variant
from biper.files import write_rows
from biper.models.checkpoint import load_checkpoint
from biper.nn.quantization_error import quantization_error
from biper.packed.file import save_packed
from biper.packed.pack import pack
from biper.training.checkpoint import BEST

PACKED = "packed.safetensors"  # beside a variant's checkpoint of stage 2
Found = dict[str, dict[str, dict[int, Outcome]]]  # by the study, the variant and the seed
log = logging.getLogger("biper")


def ablate(
    experiment: Experiment,
    names: Sequence[str],
    choices: Path | None = None,
    jobs: Jobs = SERIAL,
    variants: Sequence[str] = (),
) -> None:
    """Train what is missing of the named studies, and write their tables and pictures into the experiment's folder.

    choices: the file of the study `recipe`; variants: those of one study that are trained, with its base; empty for
    all. Raises TrainingDiverged at the end, naming what the tables leave out, and what `conduct_studies` raises.
    """
    experiment.require_folder("runs")
    studies = {name: _study(name, experiment, choices) for name in names}
    if variants:
        studies = {name: study.only(variants) for name, study in studies.items()}
    experiment.announce()
    _, diverged = conduct_studies(experiment, studies, jobs)
    require_all(diverged)


def require_all(diverged: Sequence[str]) -> None:
    """Raise TrainingDiverged, naming the runs that the tables leave out, if there are any."""
    if diverged:
        raise TrainingDiverged(f"training diverged, which the tables leave out: {'; '.join(diverged)}")


def conduct_studies(
    experiment: Experiment, chosen: Mapping[str, Study], jobs: Jobs = SERIAL
) -> tuple[Found, list[str]]:
    """Train what is missing, seed by seed, and write tables and pictures; returns all there is, and what diverged.

    They are written as soon as there is something new to tell, the logs after each seed; of several jobs once all have
    ended. What is in the folder already stays in the tables and is not trained again, and an interrupted run goes on.
    Raises UsageError if a table there has a variant that is not known now.
    """
    family, folder = experiment.recipe.family, experiment.folder
    for name, study in chosen.items():
        _require_variants(study, folder / f"{name}.csv")
    found: Found = {name: {variant.title: {} for variant in study.variants} for name, study in chosen.items()}
    for name, study in chosen.items():  # first what is there, so that no table loses a seed
        for variant in study.variants:
            for seed in _seeds_there(variant, folder):
                found[name][variant.title][seed] = trained(Trial(family, variant, seed, folder))
    missing = {
        (name, variant.title, seed): Trial(family, variant, seed, folder)
        for seed in experiment.seeds
        for name, study in chosen.items()
        for variant in study.variants
        if seed not in found[name][variant.title]
    }
    broken = train_beside(list(missing.values()), jobs) if jobs.count > 1 else {}
    diverged = []
    for seed in experiment.seeds:
        for name, study in chosen.items():
            for title in (variant.title for variant in study.variants if (name, variant.title, seed) in missing):
                log.info("== %s: %s, seed %d", name, title, seed)
                try:
                    _require_none(broken, missing[name, title, seed])
                    found[name][title][seed] = trained(missing[name, title, seed])
                except TrainingDiverged as error:
                    log.warning("%s, seed %d, is left out: %s", title, seed, error)
                    diverged.append(f"{name}: {title}, seed {seed}")
            report_study(name, study, found[name], folder, experiment.preface() + study.listed)
        write_logs(folder)  # once a seed: it reads every checkpoint
    return found, diverged


def _study(name: str, experiment: Experiment, choices: Path | None) -> Study:
    if name != CHOICES:
        return STUDIES[name](experiment.recipe)
    if choices is None:
        raise UsageError(f"the study {CHOICES} compares what a file names: give --choices FILE.yaml")
    return recipe_choices(experiment.recipe, choices, seeds=experiment.seeds)


def variants_there(table: Path) -> set[str]:
    """The variants that a study's table has; none if there is no table."""
    return {row["variant"] for row in csv.DictReader(table.read_text().splitlines())} if table.exists() else set()


def _require_variants(study: Study, table: Path) -> None:
    """Raise UsageError if a table that is there has a variant which the study lacks: it would be lost."""
    if lost := variants_there(table) - {variant.title for variant in study.variants}:
        text = f"{table} has {', '.join(sorted(lost))}, which nothing registers or names now"
        remedy = "--import the file that does, add it to --choices or --variants, or give another --results_dir"
        raise UsageError(f"{text}: {remedy}")


def _seeds_there(variant: Variant, folder: Path) -> list[int]:
    """The seeds of which both stages of a variant are finished."""
    names = {home.name.removeprefix("seed") for home in folder.glob("runs/*/seed*")}
    seeds = sorted(int(name) for name in names if name.isdecimal())
    return [seed for seed in seeds if all(is_there(home, s) for s, home in variant.homes(seed, folder).items())]


def _require_none(diverged: Mapping[Path, str], trial: Trial) -> None:
    """Raise TrainingDiverged if one of the trial's runs has, with what was said of it."""
    for home in trial.homes.values():
        if home in diverged:
            raise TrainingDiverged(diverged[home])


def trained(trial: Trial) -> Outcome:
    """What a trial came to, trained if it is not there; the binary network is packed beside its checkpoint."""
    runs = conduct(trial.family, trial.settings, trial.seed, trial.homes)
    packed = runs[2].folder / PACKED
    if not packed.exists():
        save_packed(pack(load_checkpoint(runs[2].checkpoint)), packed, float(runs[2].best["test_top1"]))
    return Outcome(runs, {s: quantization_error(load_checkpoint(run.checkpoint)) for s, run in runs.items()})


def write_logs(folder: Path) -> None:
    """metrics.csv: every epoch of every run in the folder; layers.csv: each layer's quantization error, best epoch."""
    metrics, layers = [], []
    for home in sorted(path.parent for path in folder.glob(f"runs/*/seed*/stage*/{BEST}")):
        run, seed, stage = home.parts[-3:]
        labels = {"run": run, "seed": seed.removeprefix("seed"), "stage": stage.removeprefix("stage")}
        metrics += [{**labels, **row} for row in logged(home)]
        error = quantization_error(load_checkpoint(home / BEST))
        layers += [{**labels, **asdict(layer)} for layer in error.layers]
    write_rows(metrics, folder / "metrics.csv")
    write_rows(layers, folder / "layers.csv")
