"""Where things lie: the recipes and weights that come with biper, and the data sets that are given no folder."""

import os
from pathlib import Path

from biper.errors import UsageError

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent if (HERE.parent / "cifar10" / "main.py").is_file() else None  # None: installed from a wheel
RECIPES = REPOSITORY or HERE / "recipes"  # has cifar10/configs/resnet20.yaml and so on; setup.py puts them there
PRETRAINED = REPOSITORY / "pretrained_models" if REPOSITORY else HERE / "pretrained"
DATA = "BIPER_DATA"  # environment variable: the folder of all data sets


def data_home() -> Path | None:
    """The folder that has one for each data set, by its name; None: the repository says where each one lies."""
    if os.environ.get(DATA):
        return Path(os.environ[DATA]).expanduser()
    if REPOSITORY:
        return None
    return users_folder("XDG_DATA_HOME", ".local/share")


def users_folder(variable: str, default: str) -> Path:
    """biper's own in the folder that a variable of the XDG specification names, or in `default` of the user's home.

    A relative one is to be ignored. Raises RuntimeError for a user without a home.
    """
    named = Path(os.environ.get(variable, ""))
    return (named if named.is_absolute() else Path.home() / default) / "biper"


def list_recipes() -> list[str]:
    """The recipes that come with biper, as they are given on the command line."""
    return sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.glob("*/configs/**/*.yaml"))


def find_recipe(path: Path, missing: str) -> Path:
    """A recipe's file: the one at path or, if there is none, the one of this name that comes with biper.

    Raises UsageError, which begins with `missing`, if neither is there.
    """
    if path.exists():
        return path
    if path.as_posix() in list_recipes():
        return RECIPES / path
    raise UsageError(f"{missing}; with biper come {', '.join(list_recipes())}")
