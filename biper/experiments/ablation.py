"""Train the variants of studies over seeds, and keep the logs of all runs."""

import csv
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from biper.errors import TrainingDiverged, UsageError
from biper.experiments.choices import recipe_choices
from biper.experiments.plan import Experiment
from biper.experiments.recipe import Recipe
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
log = logging.getLogger("biper")


def ablate(experiment: Experiment, names: Sequence[str], choices: Path | None = None) -> None:
    """Train what is missing, seed by seed, and write the tables and pictures of the named studies into its folder.

    They are written as soon as there is something new to tell, the logs after each seed. What is in the folder already
    stays in the tables and is not trained again, and an interrupted run goes on. Runs that diverge are left out, and
    named at the end by TrainingDiverged. Raises UsageError if a table there has a variant that is not known now.
    choices: the file of the study `recipe`.
    """
    recipe, folder = experiment.recipe, experiment.folder
    experiment.require_folder("runs")
    experiment.announce()
    chosen = {name: _study(name, recipe, choices) for name in names}
    for name, study in chosen.items():
        _require_variants(study, folder / f"{name}.csv")
    found: dict[str, dict[str, dict[int, Outcome]]] = {
        name: {variant.title: {} for variant in study.variants} for name, study in chosen.items()
    }
    for name, study in chosen.items():  # first what is there, so that no table loses a seed
        for variant in study.variants:
            for seed in _seeds_there(variant, folder):
                found[name][variant.title][seed] = trained(recipe.family, variant, seed, folder)
    preface, listed = experiment.preface(), f"\n\n```yaml\n{choices.read_text().strip()}\n```" if choices else ""
    diverged = []
    for seed in experiment.seeds:
        for name, study in chosen.items():
            for variant in study.variants:
                if seed in found[name][variant.title]:
                    continue
                log.info("== %s: %s, seed %d", name, variant.title, seed)
                try:
                    found[name][variant.title][seed] = trained(recipe.family, variant, seed, folder)
                except TrainingDiverged as error:
                    log.warning("%s, seed %d, is left out: %s", variant.title, seed, error)
                    diverged.append(f"{name}: {variant.title}, seed {seed}")
            report_study(name, study, found[name], folder, preface + (listed if name == CHOICES else ""))
        write_logs(folder)  # once a seed: it reads every checkpoint
    if diverged:
        raise TrainingDiverged(f"training diverged, which the tables leave out: {'; '.join(diverged)}")


def _study(name: str, recipe: Recipe, choices: Path | None) -> Study:
    if name != CHOICES:
        return STUDIES[name](recipe)
    if choices is None:
        raise UsageError(f"the study {CHOICES} compares what a file names: give --choices FILE.yaml")
    return recipe_choices(recipe, choices)


def _require_variants(study: Study, table: Path) -> None:
    """Raise UsageError if a table that is there has a variant which the study lacks: it would be lost."""
    there = {row["variant"] for row in csv.DictReader(table.read_text().splitlines())} if table.exists() else set()
    if lost := there - {variant.title for variant in study.variants}:
        text = f"{table} has {', '.join(sorted(lost))}, which nothing registers or names now"
        raise UsageError(f"{text}: --import the file that does, or add it to --choices, or give another --results_dir")


def _seeds_there(variant: Variant, folder: Path) -> list[int]:
    """The seeds of which both stages of a variant are finished."""
    names = {home.name.removeprefix("seed") for home in folder.glob("runs/*/seed*")}
    seeds = sorted(int(name) for name in names if name.isdecimal())
    return [seed for seed in seeds if all(is_there(home, s) for s, home in homes(variant, seed, folder).items())]


def homes(variant: Variant, seed: int, folder: Path) -> dict[int, Path]:
    """The folders of a variant's stages."""
    return {s: folder / "runs" / key / f"seed{seed}" / f"stage{s}" for s, (key, _) in variant.stages.items()}


def trained(family: str, variant: Variant, seed: int, folder: Path) -> Outcome:
    """A variant's stages of one seed; the binary network is packed beside its checkpoint."""
    settings = {s: settings for s, (_, settings) in variant.stages.items()}
    runs = conduct(family, settings, seed, homes(variant, seed, folder))
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
