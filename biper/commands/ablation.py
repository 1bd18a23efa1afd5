"""Variants of a recipe over seeds: ablation.py."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biper.commands.arguments import Parser, add_experiment, read_experiment
from biper.commands.process import prepare_job, run_experiment
from biper.errors import UsageError, run_command
from biper.experiments.studies import BIPER_STUDIES, CHOICES, STUDIES

MOST = 10_000  # of jobs and of halvings


def build_parser(prog: str) -> Parser:
    """The recipe, its seeds, every setting of data and hardware, and the studies."""
    text = f"Variants of a recipe over seeds, which answer the questions of studies: {', '.join((*STUDIES, CHOICES))}."
    parser = Parser(prog=prog, description=text)
    add_experiment(parser, "results/ablation_<recipe>_<data>_<epochs>")
    parser.add_argument("--studies", nargs="+", choices=(*STUDIES, CHOICES), help=f"default: {' '.join(BIPER_STUDIES)}")
    text = "of a study only these, and what it compares with; of a table that is there, all that it has"
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=text)
    parser.add_argument("--choices", type=Path, metavar="FILE.yaml", help="changes of the recipe for the study recipe")
    text = "train the choices for 1/2**N of the epochs, then N times the better half of them for twice as long"
    parser.add_argument("--halvings", type=int, metavar="N", help=text)
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time, a thread each; default 1")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "ablation.py") -> None:
    """Train what is missing, and write what it came to. Exits with 0, 1 (diverged), 2 (bad input) or 128 + signal."""
    run_command(lambda: _ablate(read_experiment(build_parser(prog), argv), prog))


def _ablate(given: dict[str, Any], prog: str) -> None:
    from biper.experiments.ablation import ablate
    from biper.experiments.halving import halve
    from biper.experiments.parallel import Jobs
    from biper.experiments.plan import planned

    for name in ("jobs", "halvings"):
        if not 1 <= given.get(name, 1) <= MOST:
            raise UsageError(f"--{name} {given[name]}: at least 1, and at most {MOST}")
    choices, halvings = given.get("choices"), given.get("halvings")
    studies = given.get("studies", BIPER_STUDIES if choices is None else (CHOICES,))
    if choices is not None and CHOICES not in studies:
        raise UsageError(f"--choices is the file of the study {CHOICES}: add it to --studies, or leave --studies out")
    if halvings is not None and (choices is None or tuple(studies) != (CHOICES,)):
        raise UsageError("--halvings is of the choices in a file: give --choices FILE.yaml, and no other --studies")
    variants = given.get("variants", ())
    if variants and len(studies) > 1:
        raise UsageError("--variants are those of one study: name it, as in --studies quantizers")
    if variants and halvings:
        raise UsageError("--halvings trains all choices first: leave --variants out")
    jobs = Jobs(given.pop("jobs", 1), functools.partial(prepare_job, given.get("import", [])))
    experiment = planned("ablation", given, prog)
    if halvings and choices:
        run_experiment(lambda: halve(experiment, choices, halvings, jobs))
    else:
        run_experiment(lambda: ablate(experiment, studies, choices, jobs, variants))
