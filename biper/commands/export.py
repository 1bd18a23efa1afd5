"""A checkpoint to a packed file, to ONNX and to QONNX: export.py."""

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
    text = "write it as QONNX too, for FPGA tools: binary weights and signs behind BipolarQuant, one image at a time"
    parser.add_argument("--qonnx", type=Path, metavar="FILE.onnx", help=text)
    text = """of --qonnx: the weights of real layers as signed integers of N bits (2 to 16) behind Quant, times a scale
        for each output channel of a convolution, one for a linear layer; absent: float32"""
    parser.add_argument("--bits", type=int, metavar="N", help=text)
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
    onnx, facts, qonnx, bits = (given.pop(name, None) for name in ("onnx", "facts", "qonnx", "bits"))
    export(given.pop("checkpoint"), given.pop("output"), onnx, given, facts, qonnx, bits)
