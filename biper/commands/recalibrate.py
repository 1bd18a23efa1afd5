"""Batch norm's statistics measured anew, into a new checkpoint: biper recalibrate."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biper.commands.arguments import Parser, add_setting, read_flags
from biper.errors import run_command

FLAGS = (
    "dataset",
    "data_path",
    "image_size",
    "workers",
    "use_dali",
    "batch_size",
    "batch_size_test",
    "device",
    "compile",
)


def build_parser(prog: str) -> Parser:
    """The checkpoint, the file to write, and where data and hardware are others than the training's."""
    text = "Measure batch norm's statistics anew over the training images, with the checkpoint's final weights."
    parser = Parser(prog=prog, description=text)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="of either stage; it stays as it is")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the checkpoint to write")
    group = parser.add_argument_group("data and hardware, by default those of the training")
    for name in FLAGS:
        add_setting(group, name)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "biper recalibrate") -> None:
    """Write the checkpoint, and print accuracies before and after. Exits with 0, 1 (not finite) or 2 (bad input)."""
    run_command(lambda: _recalibrate(read_flags(build_parser(prog), argv)))


def _recalibrate(given: dict[str, Any]) -> None:
    from biper.training.log import log_to_console
    from biper.training.recalibrate import recalibrate

    log_to_console(logging.INFO)
    recalibrate(given.pop("checkpoint"), given.pop("output"), given)
