"""Variants of a recipe over seeds: ablation.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biper.commands.arguments import Parser, add_experiment, read_experiment
from biper.commands.process import run_experiment
from biper.errors import UsageError, run_command
from biper.experiments.studies import BIPER_STUDIES, CHOICES, STUDIES


def build_parser(prog: str) -> Parser:
    """The recipe, its seeds, every setting of data and hardware, and the studies."""
    text = f"Variants of a recipe over seeds, which answer the questions of studies: {', '.join((*STUDIES, CHOICES))}."
    parser = Parser(prog=prog, description=text)
    add_experiment(parser, "results/ablation_<recipe>_<data>_<epochs>")
    parser.add_argument("--studies", nargs="+", choices=(*STUDIES, CHOICES), help=f"default: {' '.join(BIPER_STUDIES)}")
    parser.add_argument("--choices", type=Path, metavar="FILE.yaml", help="changes of the recipe for the study recipe")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "ablation.py") -> None:
    """Train what is missing, and write what it came to. Exits with 0, 1 (diverged), 2 (bad input) or 128 + signal."""
    run_command(lambda: _ablate(read_experiment(build_parser(prog), argv), prog))


def _ablate(given: dict[str, Any], prog: str) -> None:
    from biper.experiments.ablation import ablate
    from biper.experiments.plan import planned

    choices = given.get("choices")
    studies = given.get("studies", BIPER_STUDIES if choices is None else (CHOICES,))
    if choices is not None and CHOICES not in studies:
        raise UsageError(f"--choices is the file of the study {CHOICES}: add it to --studies, or leave --studies out")
    experiment = planned("ablation", given, prog)
    run_experiment(lambda: ablate(experiment, studies, choices))
