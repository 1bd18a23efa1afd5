"""A recipe over seeds, with its tables, pictures and model cards: reproduce.py."""

from collections.abc import Sequence
from typing import Any

from biper.commands.arguments import Parser, add_experiment, read_experiment
from biper.commands.process import run_experiment
from biper.errors import run_command


def build_parser(prog: str) -> Parser:
    """The recipe, its seeds, and every setting of data and hardware."""
    text = "Both stages of a recipe for every seed, evaluated and packed, as a table, pictures and model cards."
    parser = Parser(prog=prog, description=text)
    add_experiment(parser, "results/<recipe>_<data>_<epochs>")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "reproduce.py") -> None:
    """Train what is missing, and write what it came to. Exits with 0, 1 (diverged), 2 (bad input) or 128 + signal."""
    run_command(lambda: _reproduce(read_experiment(build_parser(prog), argv), prog))


def _reproduce(given: dict[str, Any], prog: str) -> None:
    from biper.experiments.plan import planned
    from biper.experiments.reproduce import reproduce

    experiment = planned("reproduce", given, prog)
    run_experiment(lambda: reproduce(experiment))
