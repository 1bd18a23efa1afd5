"""Batch norm's statistics measured anew, into a new checkpoint: biper recalibrate."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biper.commands.arguments import Parser, add_data_and_hardware, add_published, read_flags
from biper.errors import run_command


def build_parser(prog: str) -> Parser:
    """The checkpoint, the file to write, and every setting of data and hardware."""
    text = "Measure batch norm's statistics anew over the training images, with the checkpoint's final weights."
    parser = Parser(prog=prog, description=text)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="of either stage")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the checkpoint to write")
    parser.add_argument("-b", "--batch_size", type=int, metavar="N", help="by default that of the training")
    add_published(parser)
    add_data_and_hardware(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "biper recalibrate") -> None:
    """Write the checkpoint, and print accuracies before and after. Exits with 0 or 2 (bad input)."""
    run_command(lambda: _recalibrate(read_flags(build_parser(prog), argv)))


def _recalibrate(given: dict[str, Any]) -> None:
    from biper.training.log import log_to_console
    from biper.training.recalibrate import recalibrate

    log_to_console(logging.INFO)
    recalibrate(given.pop("checkpoint"), given.pop("output"), given)
