"""What the parsers of the commands are made of; nothing here, or that is imported here, waits for torch."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from biper.commands.importing import import_file
from biper.errors import UsageError
from biper.experiments.recipe import FREE
from biper.places import find_recipe
from biper.training.settings import FAMILY_DEFAULTS, SETTINGS, Settings, changed, expand_shorthands, read_yaml


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose result holds what the user gave, without defaults."""

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **kwargs)
        self.register("type", Path, _path)
        text = "run a file of your own first, which registers a quantizer or a model; may be given several times"
        self.add_argument("--import", action="append", type=Path, metavar="FILE.py", help=text)
        self.imported: list[Path] = []

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with the message."""
        raise UsageError(f"{message} (see {self.prog} --help)")

    def read(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """What the user gave, by name, once the files of --import have run; these are kept as `imported`.

        Raises UsageError for what is unfit.
        """
        given = vars(self.parse_args(argv))
        self.imported = given.pop("import", [])
        for path in self.imported:
            import_file(path)
        return given


def _path(text: str) -> Path:
    if not text:  # which Path takes for the folder of the command
        raise argparse.ArgumentTypeError("it is empty: is a variable of the shell not set?")
    return Path(text)


def add_setting(
    group: argparse._ArgumentGroup,
    name: str,
    default: Any = None,  # noqa: ANN401
    helped: bool = True,
) -> None:
    """The flag of a field of Settings. default: what the help calls so, unless empty; helped: it is in the help."""
    f: Field[Any] = SETTINGS[name]
    names = [*([f.metadata["short"]] if f.metadata["short"] else []), f"--{name}"]
    hint = get_type_hints(Settings)[name]
    text = f.metadata["text"].replace("%", "%%")
    if default not in ("", None, ()) and hint is not bool:
        text += f" (default {default})"
    if not helped:
        text = argparse.SUPPRESS
    if hint is bool:
        group.add_argument(*names, action=argparse.BooleanOptionalAction, help=text)
        return
    many = get_origin(hint) is tuple
    kind = get_args(hint)[0] if get_args(hint) else hint
    group.add_argument(
        *names,
        type=kind,
        nargs="+" if many else None,
        choices=f.metadata["choices"] or None,
        metavar=None if f.metadata["choices"] else {int: "N", float: "X", str: "NAME"}[kind],
        help=text,
    )


def add_published(parser: Parser) -> None:
    """The flags for what a checkpoint of the published code does not say of itself."""
    parser.add_argument("--freq", type=float, help="for a published checkpoint without its config.txt")
    parser.add_argument("--model", help="for a published checkpoint that does not say its model")


def add_experiment(parser: Parser, folder: str) -> None:
    """What experiments have in common: the recipe, its seeds, and every setting of data and hardware."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="with sections stage1 and stage2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default 0")
    parser.add_argument("--results_dir", type=Path, metavar="DIR", help=f"default {folder}")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs_scale", type=float, metavar="X", help="shorten both stages to X of their epochs")
    length.add_argument("--epochs", type=int, nargs=2, metavar=("N1", "N2"), help="of stage 1 and of stage 2")
    parser.add_argument("--family", choices=tuple(FAMILY_DEFAULTS), help="of the model; by default after the data")
    parser.add_argument("--data_name", metavar="TEXT", help="what tables and cards call the data")
    for group in FREE:
        arguments = parser.add_argument_group(group)
        for name, f in SETTINGS.items():
            if f.metadata["group"] == group:
                add_setting(arguments, name)


def choose_recipe(path: Path, missing: str) -> Path:
    """A recipe's file: the user's or, if there is none, the one that comes with biper, which a line says.

    Raises UsageError, which begins with `missing`, if neither is there.
    """
    found = find_recipe(path, missing)
    if found != path and os.environ.get("RANK", "0") == "0":
        print(f"there is no {path} here: taking the one that comes with biper, {found}", file=sys.stderr)
    return found


def read_experiment(parser: Parser, argv: Sequence[str] | None) -> dict[str, Any]:
    """What the user gave for an experiment, with its recipe's file and what was imported."""
    given = parser.read(argv)
    given["recipe"] = choose_recipe(given["recipe"], f"no recipe at {given['recipe']}")
    return given | ({"import": parser.imported} if parser.imported else {})


def read_options(parser: Parser, argv: Sequence[str] | None, stage: int) -> dict[str, Any]:
    """The settings given by flags and by --config, where flags win; defaults are not among them."""
    flags = read_flags(parser, argv)
    return with_config(flags, read_config(flags, stage))


def read_flags(parser: Parser, argv: Sequence[str] | None) -> dict[str, Any]:
    """What the flags give, as settings have it."""
    flags = expand_shorthands(parser.read(argv))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}


def read_config(flags: Mapping[str, Any], stage: int) -> dict[str, Any]:
    """The settings in the file of --config; {} without one. Raises UsageError if it is unfit."""
    if not flags.get("config"):
        return {}
    path = Path(flags["config"])
    return read_yaml(choose_recipe(path, f"cannot read --config {path}: there is no such file"), stage)


def with_config(flags: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of both, where flags win."""
    left = {"load_ckpt_stage1"} if flags.get("from_scratch") else set()
    kept = {name: value for name, value in config.items() if name not in left}
    return changed(kept, {name: value for name, value in flags.items() if name != "config"})
