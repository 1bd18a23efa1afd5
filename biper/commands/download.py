"""Fetch CIFAR, or unpack an archive of it: cifar10/dataset/download.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biper.commands.arguments import Parser
from biper.errors import run_command


def build_parser(prog: str) -> Parser:
    """The data set, and where it comes from and goes to."""
    parser = Parser(prog=prog, description="Download CIFAR-10 or CIFAR-100, or unpack a local archive of it.")
    parser.add_argument("--dataset", choices=("cifar10", "cifar100"), default="cifar10", help="default cifar10")
    parser.add_argument("--data_path", type=Path, default=None, help="where to put it; absent: where training looks")
    parser.add_argument("--archive", type=Path, default=None, metavar="FILE", help="a cifar-10-python.tar.gz at hand")
    text = "take an archive although its MD5 is not the published one"
    parser.add_argument("--accept_checksums", action="store_true", default=False, help=text)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "download.py") -> None:
    """Put the data set where training looks for it. Exits with 0 or 2 (bad input, or no network)."""
    run_command(lambda: _download(build_parser(prog).read(argv)))


def _download(given: dict[str, Any]) -> None:
    from biper.data.cifar import fetch_cifar
    from biper.data.datasets import default_data_path

    path = given["data_path"] or default_data_path(given["dataset"])
    fetch_cifar(given["dataset"], path, given["archive"], given["accept_checksums"])
    print(f"{given['dataset']} is in {path}")
