"""What the parsers of the commands are made of; nothing here, or that is imported here, waits for torch."""

import argparse
from collections.abc import Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from biper.errors import UsageError
from biper.experiments.recipe import FREE
from biper.training.settings import FAMILY_DEFAULTS, SETTINGS, Settings, expand_tau, read_yaml


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose result holds what the user gave, without defaults."""

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with the message."""
        raise UsageError(f"{message} (see --help)")


def add_setting(group: argparse._ArgumentGroup, name: str, default: Any = None) -> None:  # noqa: ANN401
    """The flag of a field of Settings. default: what the help says that it is; empty values are not shown."""
    f: Field[Any] = SETTINGS[name]
    names = [*([f.metadata["short"]] if f.metadata["short"] else []), f"--{name}"]
    hint = get_type_hints(Settings)[name]
    text = f.metadata["text"].replace("%", "%%")
    if default not in ("", None, ()) and hint is not bool:
        text += f" (default {default})"
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


def read_options(parser: Parser, argv: Sequence[str] | None, stage: int | None) -> dict[str, Any]:
    """The settings given by flags and by --config, where flags win; defaults are not among them."""
    flags = vars(parser.parse_args(argv))
    file = flags.pop("config", None)
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in expand_tau(flags).items()}
    recipe = read_yaml(Path(file), stage or 2) if file else {}
    if flags.get("from_scratch"):
        recipe.pop("load_ckpt_stage1", None)  # flags win over the recipe
    return recipe | flags
