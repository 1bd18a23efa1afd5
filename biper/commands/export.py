"""A checkpoint to a packed file, to ONNX and QONNX, to C and to a web page: export.py."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biper.commands.arguments import Parser, add_published
from biper.errors import UsageError, run_command

SKIPS = ("float32", "int16", "int8")
OUTPUTS = {
    "output": "-o FILE",
    "onnx": "--onnx FILE.onnx",
    "c": "--c DIR",
    "web": "--web DIR",
    "qonnx": "--qonnx FILE.onnx",
}


def build_parser(prog: str) -> Parser:
    """The checkpoint, and the files to write."""
    parser = Parser(prog=prog, description="Pack a binary network: weights of one bit, in one small file, or as C.")
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a file of stage 2; without -o a packed file too"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the packed file to write")
    parser.add_argument("--onnx", type=Path, metavar="FILE.onnx", help="write the network as ONNX")
    parser.add_argument("--web", type=Path, metavar="DIR", help="write a web page with the network in it; needs clang")
    text = "write it as QONNX for FPGA tools: binary weights and signs behind BipolarQuant, one image at a time"
    parser.add_argument("--qonnx", type=Path, metavar="FILE.onnx", help=text)
    text = """of --qonnx: the weights of real layers as signed integers of N bits (2 to 16) behind Quant, times a scale
        for each output channel of a convolution, one for a linear layer; absent: float32"""
    parser.add_argument("--bits", type=int, metavar="N", help=text)
    parser.add_argument("--facts", type=Path, metavar="FILE.json", help="write sizes, speeds and agreement as JSON")
    parser.add_argument("--c", type=Path, metavar="DIR", help="write a folder of C99 that any compiler takes")
    parser.add_argument(
        "--skips",
        choices=SKIPS,
        default="float32",
        help="how C stores numbers along the skips: int8 takes a quarter of the memory, and its scales training images",
    )
    parser.add_argument("--data_path", help="images for comparisons and --skips; absent: where the checkpoint's were")
    parser.add_argument("--dataset", help="data set of these images; absent: the checkpoint's")
    add_published(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "export.py") -> None:
    """Pack, compare and measure. Exits with 0, 1 (what was written computes something else) or 2 (bad input)."""
    run_command(lambda: _export(build_parser(prog).read(argv)))


def _export(given: dict[str, Any]) -> None:
    from biper.packed.file import is_packed
    from biper.training.export import export, require_outputs, write_onnx
    from biper.training.export_c import write_c
    from biper.training.export_qonnx import write_qonnx
    from biper.training.log import log_to_console
    from biper.training.web import export_page

    log_to_console(logging.INFO)
    checkpoint, facts = given.pop("checkpoint"), given.pop("facts", None)
    target, onnx, c, web, qonnx = (given.pop(name, None) for name in OUTPUTS)
    skips, bits = given.pop("skips"), given.pop("bits", None)
    if not any((target, onnx, c, web, qonnx)):
        raise UsageError(f"there is nothing to write: give one or more of {', '.join(OUTPUTS.values())}")
    if facts and not target:
        raise UsageError(f"--facts {facts} goes with the packed file: give -o FILE too")
    if target and is_packed(checkpoint):
        raise UsageError(f"{checkpoint} is packed already: leave -o out")
    if asked := [f"--{name}" for name in ("dataset", "data_path") if given.get(name) and not (target or c or qonnx)]:
        raise UsageError(f"{asked[0]} says which images are compared: give -o FILE, --c DIR or --qonnx FILE.onnx too")
    if skips != SKIPS[0] and not c:
        raise UsageError(f"--skips {skips} is for C: give --c DIR too")
    require_outputs({"-o": target, "--onnx": onnx, "--facts": facts, "--qonnx": qonnx, "--c": c, "--web": web}, bits)
    # first what may be refused for a layer that it does not know
    if c:
        write_c(checkpoint, c, skips, given)
    if web:
        export_page(checkpoint, web, given)
    if qonnx:
        write_qonnx(checkpoint, qonnx, bits, given)
    if target:
        export(checkpoint, target, onnx, given, facts)
    elif onnx:
        write_onnx(checkpoint, onnx, given)
