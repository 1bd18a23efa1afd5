"""ImageNet's archives to class folders: imagenet/dataset/prepare.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biper.commands.arguments import Parser
from biper.errors import run_command


def build_parser(prog: str) -> Parser:
    """Where the archives lie, and where the images go."""
    parser = Parser(prog=prog, description="Unpack the archives of ImageNet (ILSVRC 2012) into class folders.")
    parser.add_argument(
        "--archives", type=Path, required=True, metavar="DIR", help="where the downloaded .tar files lie"
    )
    parser.add_argument("--data_path", type=Path, default=None, help="where to put it; absent: where training looks")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "prepare.py") -> None:
    """Put the images where training looks for them. Exits with 0 or 2 (bad input)."""
    run_command(lambda: _prepare(build_parser(prog).read(argv)))


def _prepare(given: dict[str, Any]) -> None:
    from biper.data.datasets import default_data_path
    from biper.data.imagenet import prepare_imagenet

    path = given["data_path"] or default_data_path("imagenet")
    prepare_imagenet(given["archives"], path)
    print(f"imagenet is in {path}")
