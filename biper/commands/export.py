"""A checkpoint to a packed file, to ONNX, to C and to a web page: export.py."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biper.commands.arguments import Parser, add_published
from biper.errors import UsageError, run_command

SKIPS = ("float32", "int16", "int8")
OUTPUTS = ("output", "onnx", "facts", "c", "skips", "web")


def build_parser(prog: str) -> Parser:
    """The checkpoint, and the files to write."""
    parser = Parser(prog=prog, description="Pack a binary network: weights of one bit, in one small file, or as C.")
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a file of stage 2; for --c and --web a packed file too"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the packed file to write")
    parser.add_argument("--onnx", type=Path, metavar="FILE.onnx", help="write the network as ONNX too")
    parser.add_argument("--web", type=Path, metavar="DIR", help="write a web page with the network in it; needs clang")
    parser.add_argument("--facts", type=Path, metavar="FILE.json", help="write sizes, speeds and agreement as JSON")
    parser.add_argument("--c", type=Path, metavar="DIR", help="write a folder of C99 that any compiler takes")
    parser.add_argument(
        "--skips",
        choices=SKIPS,
        default="float32",
        help="how C stores numbers along the skips: float32 is exact, int8 takes a quarter of the memory",
    )
    parser.add_argument("--data_path", help="test images for the comparison; absent: where the checkpoint's were")
    add_published(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "export.py") -> None:
    """Pack, compare and measure. Exits with 0, 1 (what was written computes something else) or 2 (bad input)."""
    run_command(lambda: _export(build_parser(prog).read(argv)))


def _export(given: dict[str, Any]) -> None:
    from biper.packed.c.export import require_empty
    from biper.training.export import export
    from biper.training.export_c import write_c
    from biper.training.log import log_to_console
    from biper.training.web import export_page, require_page

    log_to_console(logging.INFO)
    target, onnx, facts, c, skips, web = (given.pop(name, None) for name in OUTPUTS)
    checkpoint = given.pop("checkpoint")
    if target is None and c is None and web is None:
        raise UsageError("there is nothing to write: give -o FILE, --c DIR or --web DIR, one or more of them")
    for flag, path in {"--onnx": onnx, "--facts": facts}.items():
        if path is not None and target is None:
            raise UsageError(f"{flag} {path} is of the packed file: give -o FILE too")
    if skips not in (None, "float32") and c is None:
        raise UsageError(f"--skips {skips} is for C: give --c DIR too")
    if c is not None:
        require_empty(c)
    if web is not None:
        require_page(web)
    if target is not None:
        export(checkpoint, target, onnx, given, facts)
    if c is not None:
        write_c(checkpoint, c, skips or "float32", given)
    if web is not None:
        export_page(checkpoint, web, given)
