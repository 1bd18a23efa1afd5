"""The likeliest classes of images: predict.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biper.commands.arguments import Parser, add_published
from biper.errors import printable, run_command


def build_parser(prog: str) -> Parser:
    """A network and images."""
    parser = Parser(prog=prog, description="What a network sees in images: its five likeliest classes.")
    parser.add_argument("network", type=Path, metavar="FILE", help="a packed network or a checkpoint")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    add_published(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "predict.py") -> None:
    """Print the classes of each image, with their probabilities. Exits with 0 or 2 (bad input)."""
    run_command(lambda: _predict(build_parser(prog).read(argv)))


def _predict(given: dict[str, Any]) -> None:
    from biper.training.inheritance import load_network
    from biper.training.predict import predict

    network = load_network(given["network"], given)
    for image, guesses in zip(given["images"], predict(network, given["images"]), strict=True):
        print(printable(str(image)))
        for guess in guesses:
            print(f"  {guess.probability:7.2%}  {printable(guess.name)}")
