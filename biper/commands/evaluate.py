"""Evaluate a checkpoint or a packed network on its test images: biper evaluate, eval.sh, and -e of the others."""

import sys
from collections.abc import Sequence
from typing import Any

from biper.commands.arguments import Parser, add_setting, read_options
from biper.commands.process import prepare_process
from biper.errors import run_command
from biper.training.settings import GROUPS, SETTINGS

NAMED = ("-e", "--evaluate")  # the paper's way to name the file
UNUSED = (
    "Settings of training are taken, too, as the paper's scripts give them: they must be sound, and change no result."
)


def build_parser(prog: str, named: bool = False) -> Parser:
    """The file, by its place or (named) as -e FILE, and every setting: what contradicts the file is refused."""
    text = "Evaluate a checkpoint or a packed network. It knows network and data set: what contradicts it is refused."
    parser = Parser(prog=prog, description=text, epilog=UNUSED)
    if not named:
        parser.add_argument("evaluate", metavar="FILE", help="a checkpoint or a packed network; -e FILE is the same")
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    groups["run"].add_argument("--config", metavar="FILE", help="YAML file with a section stage2; flags win")
    for name, f in SETTINGS.items():
        if named or name != "evaluate":
            default = f.default if f.metadata["runtime"] else None  # else it is the file's
            add_setting(groups[f.metadata["group"]], name, default, helped=not f.metadata["trains"])
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "eval.sh") -> None:
    """Print what the network reaches, and write nothing. Exits with 0, 2 (bad input) or 128 + signal."""
    words = sys.argv[1:] if argv is None else argv
    named = any(word.startswith(NAMED) for word in words)
    run_command(lambda: evaluate(None, None, read_options(build_parser(prog, named), words, 2)))


def evaluate(family: str | None, stage: int | None, given: dict[str, Any]) -> None:
    """Evaluate a file with the settings given. family, stage: of a script, for a file that does not say its own."""
    from biper.training.process import signals_interrupt

    processes = prepare_process()
    with signals_interrupt():
        from biper.training.evaluate import evaluate_checkpoint
        from biper.training.inheritance import evaluation

        network, config = evaluation(family, stage, given)
        evaluate_checkpoint(network, config, processes)
