"""A checkpoint to a packed file, to ONNX, and to a web page: export.py."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biper.commands.arguments import Parser, add_published
from biper.errors import UsageError, run_command


def build_parser(prog: str) -> Parser:
    """The checkpoint, and what to write."""
    parser = Parser(prog=prog, description="Pack a binary network: weights of one bit, in one small file.")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file of stage 2; for --web packed too")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the packed file to write")
    parser.add_argument("--onnx", type=Path, metavar="FILE.onnx", help="write the network as ONNX too")
    parser.add_argument("--web", type=Path, metavar="DIR", help="write a web page with the network in it; needs clang")
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
    from biper.training.web import export_page, require_page

    log_to_console(logging.INFO)
    onnx, facts, web = given.pop("onnx", None), given.pop("facts", None), given.pop("web", None)
    checkpoint, output = given.pop("checkpoint"), given.pop("output", None)
    if output is None and (web is None or onnx or facts):
        raise UsageError("required: -o FILE, the packed file to write, or --web DIR alone (see --help)")
    if web is not None:
        require_page(web)
    if output is not None:
        export(checkpoint, output, onnx, given, facts)
    if web is not None:
        export_page(checkpoint, web, given)
