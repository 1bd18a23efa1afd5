"""The one command `biper`: which sub-commands there are; each is imported when it is asked for."""

import sys
from collections.abc import Sequence
from importlib import import_module

from biper.errors import UsageError, run_command

COMMANDS = {  # by name: its file in this folder, and what the list of commands says
    "train": ("train", "train a stage of a network, or go on with it"),
    "evaluate": ("evaluate", "the accuracy of a checkpoint or a packed network"),
    "export": ("export", "pack a binary network into a file of one bit a weight; write it as C, a web page, ONNX"),
    "predict": ("predict", "the likeliest classes of images"),
    "summary": ("summary", "parameters, bytes and operations of a network, layer by layer"),
    "quantization-error": ("quantization_error", "how far a network's real weights are from binary ones"),
    "recalibrate": ("recalibrate", "measure batch norm's statistics anew, with the final weights"),
    "reproduce": ("reproduce", "a recipe over seeds, with tables, pictures and model cards"),
    "ablate": ("ablation", "variants of a recipe over seeds: what each idea contributes"),
    "download": ("download", "fetch CIFAR-10 or CIFAR-100, or unpack an archive of it"),
    "prepare": ("prepare", "unpack ImageNet's archives into class folders"),
    "completion": ("completion", "print what completes these commands in bash, zsh or tcsh"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the first word says. Exits as that command does, with 2 if there is none of that name."""
    words = sys.argv[1:] if argv is None else list(argv)
    run_command(lambda: _dispatch(words))


def _dispatch(words: Sequence[str]) -> None:
    if not words:
        raise UsageError(f"give a command: {', '.join(COMMANDS)} (see biper --help)")
    name, *rest = words
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        from biper import __version__

        print(f"biper {__version__}")
    elif name in COMMANDS:
        import_module(f"biper.commands.{COMMANDS[name][0]}").main(argv=rest, prog=f"biper {name}")
    elif any(word.startswith(("-e", "--evaluate")) for word in words) and name.startswith("-"):
        import_module("biper.commands.evaluate").main(argv=words, prog="biper")  # python -m biper -e FILE
    else:
        raise UsageError(f"unknown command {name!r}; choose from {', '.join(COMMANDS)} (see biper --help)")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: biper COMMAND [flags]",
            "",
            "BiPer: binary neural networks using a periodic function, to train, evaluate and measure.",
            "",
            *lines,
            "",
            "`biper COMMAND --help` lists a command's flags. `biper --version` prints the version.",
        ]
    )
