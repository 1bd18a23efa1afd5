"""A checkpoint to a packed file, and to ONNX: export.py."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biper.commands.arguments import Parser, add_published
from biper.errors import run_command


def build_parser(prog: str) -> Parser:
    """The checkpoint, and the files to write."""
    parser = Parser(prog=prog, description="Pack a binary network: weights of one bit, in one small file.")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file of stage 2")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the packed file to write")
    parser.add_argument("--onnx", type=Path, metavar="FILE.onnx", help="write the network as ONNX too")
    parser.add_argument("--facts", type=Path, metavar="FILE.json", help="write sizes, speeds and agreement as JSON")
    parser.add_argument("--data_path", help="test images for the comparison; absent: where the checkpoint's were")
    add_published(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "export.py") -> None:
    """Pack, compare and measure. Exits with 0, 1 (the packed network computes something else) or 2 (bad input)."""
    run_command(lambda: _export(build_parser(prog).read(argv)))


def _export(given: dict[str, Any]) -> None:
    from biper.training.export import export
    from biper.training.log import log_to_console

    log_to_console(logging.INFO)
    onnx, facts = given.pop("onnx", None), given.pop("facts", None)
    export(given.pop("checkpoint"), given.pop("output"), onnx, given, facts)
