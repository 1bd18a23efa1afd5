"""The likeliest classes of images: predict.py."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biper.commands.arguments import Parser, add_published
from biper.errors import UsageError, printable, run_command


def build_parser(prog: str) -> Parser:
    """A network and images."""
    parser = Parser(prog=prog, description="What a network sees in images: its five likeliest classes.")
    parser.add_argument("network", type=Path, metavar="FILE", help="a packed network or a checkpoint")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files, and folders of them")
    parser.add_argument("--json", action="store_true", help="print a line of JSON an image: its file and its classes")
    add_published(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "predict.py") -> None:
    """Print the classes of each image that can be read, with their probabilities. Exits with 0 or 2 (bad input)."""
    run_command(lambda: _predict(build_parser(prog).read(argv)))


def _predict(given: dict[str, Any]) -> None:
    from biper.training.inheritance import load_network
    from biper.training.predict import find_images, predict

    network, images, bad = load_network(given["network"], given), find_images(given["images"]), False
    for image, guesses in zip(images, predict(network, images), strict=True):
        if isinstance(guesses, UsageError):
            bad = True
            print(f"error: {printable(str(guesses))}", file=sys.stderr)
        elif given.get("json"):
            classes = [{"class": guess.name, "probability": guess.probability} for guess in guesses]
            print(json.dumps({"file": str(image), "classes": classes}))
        else:
            print(printable(str(image)))
            for guess in guesses:
                print(f"  {guess.probability:7.2%}  {printable(guess.name)}")
    if bad:
        sys.exit(2)
