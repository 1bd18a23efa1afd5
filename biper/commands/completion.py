"""What completes the words of `biper` in a shell, made of the parsers of all commands: biper completion."""

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import shtab

from biper.commands.arguments import Parser
from biper.commands.main import COMMANDS
from biper.errors import run_command

SHELLS = ("bash", "zsh", "tcsh")
FILES = ("config", "evaluate", "load_ckpt_stage1", "network")  # settings and arguments that are files
FOLDERS = ("data_path", "results_dir", "archives")
HOW = """bash: biper completion bash > ~/.local/share/bash-completion/completions/biper;
zsh: into a file _biper in a folder of $fpath; tcsh: into a file that ~/.tcshrc sources. The next shell knows it."""


def build_parser(prog: str) -> Parser:
    """The shell."""
    parser = Parser(prog=prog, description="Print what completes biper's commands and flags in a shell.", epilog=HOW)
    parser.add_argument("shell", choices=SHELLS, help="the shell to print it for")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "biper completion") -> None:
    """Print the script. Exits with 0 or 2 (bad input)."""
    run_command(lambda: print(completion(build_parser(prog).read(argv)["shell"])))


def completion(shell: str) -> str:
    """The script for a shell."""
    script: str = shtab.complete(whole_parser(), shell=shell)
    return script


def whole_parser() -> argparse.ArgumentParser:
    """All commands as one parser, which is for completion alone."""
    whole = argparse.ArgumentParser(prog="biper")
    whole.add_argument("--version", action="version", version="")
    commands = whole.add_subparsers(dest="command")
    for name, (module, text) in COMMANDS.items():
        parser = import_module(f"biper.commands.{module}").build_parser(prog=f"biper {name}")
        for action in parser._actions:
            if action.dest in FOLDERS:
                action.complete = shtab.DIRECTORY
            elif action.type is Path or action.dest in FILES:
                action.complete = shtab.FILE
        commands.add_parser(name, parents=[parser], add_help=False, help=text)
    return whole
