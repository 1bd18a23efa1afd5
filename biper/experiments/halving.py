"""Successive halving: many choices for a few epochs, the better half of them for twice as many, and so on."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from biper.experiments.ablation import conduct_studies, require_all, variants_there
from biper.experiments.choices import ITSELF, recipe_choices
from biper.experiments.parallel import SERIAL, Jobs
from biper.experiments.plan import Experiment, epochs_text
from biper.experiments.recipe import with_epochs
from biper.experiments.report import Outcome
from biper.experiments.studies import CHOICES, Variant
from biper.experiments.tables import Sample, markdown
from biper.files import write_rows, write_text
from biper.training.settings import make_settings

log = logging.getLogger("biper")
Reached = dict[str, Sample]  # stage 2's best top-1 by the choice


@dataclass(frozen=True)
class Round:
    """What a round came to. epochs: the recipe's, and those of each choice, which may have others."""

    epochs: str
    of_choices: Mapping[str, str]
    reached: Reached


def halve(experiment: Experiment, choices: Path, halvings: int, jobs: Jobs = SERIAL) -> None:
    """Train the choices for a share of their epochs, then the better half of them for twice as long, until all of it.

    The recipe itself is in every round. A round is an ablation in a folder of its own, trained anew, as a schedule ends
    with its epochs; what is there is not trained again. halving.md and .csv have what each came to. Raises UsageError
    for fewer epochs than can be halved so often, and what `conduct_studies` raises; TrainingDiverged at the end.
    [Jamieson and Talwalkar 2016, arXiv 1502.07943]
    """
    recipe = experiment.recipe
    shares = [0.5 ** (halvings - number) for number in range(halvings + 1)]
    # all of them before anything is written
    studies = [recipe_choices(recipe, choices, share, experiment.seeds) for share in shares]
    experiment.require_folder("round*")
    experiment.announce()
    rounds: list[Round] = []
    kept, diverged = None, []
    for number, (share, study) in enumerate(zip(shares, studies, strict=True), 1):
        one, two = (round(share * epochs) for epochs in recipe.epochs)
        part = replace(experiment, recipe=with_epochs(recipe, (one, two)), folder=experiment.folder / f"round{number}")
        if kept is not None:
            known = kept | variants_there(part.folder / f"{CHOICES}.csv")  # which once were among the better half
            study = replace(study, variants=tuple(v for v in study.variants if v.title in known))
        log.info("== round %d of %d: %s epochs", number, len(shares), epochs_text((one, two)))
        found, lost = conduct_studies(part, {CHOICES: study}, jobs)
        diverged += [f"round {number}, {text}" for text in lost]
        reached = {title: _of_seeds(outcomes, experiment.seeds) for title, outcomes in found[CHOICES].items()}
        own = {variant.title: _epochs(recipe.family, variant) for variant in study.variants}
        there = {title: sample for title, sample in reached.items() if sample.n}
        rounds.append(Round(epochs_text((one, two)), own, there))
        _report(experiment, rounds)
        kept = {ITSELF, *better_half(there)}
    require_all(diverged)


def _epochs(family: str, variant: Variant) -> str:
    one, two = (make_settings(family, stage, settings).epochs for stage, (_, settings) in variant.stages.items())
    return epochs_text((one, two))


def _of_seeds(outcomes: Mapping[int, Outcome], seeds: Sequence[int]) -> Sample:
    """Stage 2's best top-1 with these seeds, of which some may have diverged."""
    return Sample({seed: float(outcomes[seed].runs[2].best["test_top1"]) for seed in seeds if seed in outcomes})


def better_half(reached: Reached) -> list[str]:
    """The better half of the choices, the recipe not counted, best first; of an odd number the middle one too.

    One that diverged with a seed is behind those that did not. Of equals the first in the file is the better one.
    """
    choices = [title for title in reached if title != ITSELF]
    choices.sort(key=lambda title: (-reached[title].n, -reached[title].mean))
    return choices[: math.ceil(len(choices) / 2)]


def _report(experiment: Experiment, rounds: Sequence[Round]) -> None:
    """halving.md and halving.csv: every choice, first those that came furthest, with what it came to in each round."""
    titles = list(dict.fromkeys(title for r in rounds for title in r.reached))
    titles.sort(key=lambda title: [-r.reached[title].mean if title in r.reached else 1.0 for r in reversed(rounds)])
    rows = [
        {"variant": title, "round": number, "epochs": r.of_choices[title], **r.reached[title].columns(experiment.seeds)}
        for title in titles
        for number, r in enumerate(rounds, 1)
        if title in r.reached
    ]
    write_rows(rows, experiment.folder / "halving.csv")
    table = markdown(
        ["", *(f"{r.epochs} epochs" for r in rounds)],
        [[title, *(_cell(r, title) for r in rounds)] for title in titles],
    )
    heads = "Stage 2's best top-1 (%), ± the deviation over the seeds; each round's table and logs are in its folder."
    path = experiment.folder / "halving.md"
    write_text("\n\n".join(["# Successive halving", experiment.preface(), heads, table]), path)
    log.info("\n%s\nwrote %s", table, path)


def _cell(r: Round, title: str) -> str:
    """What a choice came to in a round, with its epochs where they are not the recipe's."""
    if title not in r.reached:
        return ""
    other = "" if r.of_choices[title] == r.epochs else f" ({r.of_choices[title]} epochs)"
    return f"{r.reached[title]}{other}"
