"""A recipe: the settings of both stages in one YAML file, as they are or shortened."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from biper.config import make_config
from biper.options import read_yaml

Settings = Mapping[str, Any]  # by name; defaults are not among them
IMAGENET = ("imagenet", "tinyimagenet")


@dataclass(frozen=True)
class Recipe:
    """The settings of both stages, without where stage 2 starts from."""

    name: str
    family: str
    stage1: Settings
    stage2: Settings

    @property
    def model(self) -> str:
        """The model that both stages train."""
        return make_config(self.family, 1, self.stage1).model

    @property
    def dataset(self) -> str:
        """The data set that both stages train on."""
        return make_config(self.family, 1, self.stage1).dataset

    @property
    def epochs(self) -> tuple[int, int]:
        """The epochs of stage 1 and of stage 2."""
        return make_config(self.family, 1, self.stage1).epochs, make_config(self.family, 2, self.stage2).epochs


def read_recipe(path: Path, given: Settings) -> Recipe:
    """The recipe in a YAML file with sections stage1 and stage2; `given` settings win in both of its stages.

    Raises UsageError if the file or a setting is unfit.
    """
    one, two = (read_yaml(path, stage) | dict(given) for stage in (1, 2))
    two.pop("load_ckpt_stage1", None)
    two.setdefault("dataset", one.get("dataset", "cifar10"))
    family = "imagenet" if read_yaml(path, 1).get("dataset") in IMAGENET else "cifar10"
    recipe = Recipe(path.stem, family, one, two)
    assert recipe.epochs  # unfit settings are refused here, before any training
    return recipe


def shortened(recipe: Recipe, epochs: tuple[int, int]) -> Recipe:
    """The recipe with other numbers of epochs, the schedule of each stage shortened in proportion."""
    one, two = (
        _shortened(recipe.family, stage, settings, count)
        for stage, (settings, count) in enumerate(zip((recipe.stage1, recipe.stage2), epochs, strict=True), 1)
    )
    return replace(recipe, stage1=one, stage2=two)


def _shortened(family: str, stage: int, settings: Settings, epochs: int) -> Settings:
    c = make_config(family, stage, settings)
    scale = epochs / c.epochs
    changed: dict[str, Any] = {"epochs": epochs}
    if c.lr_decay_step:
        changed["lr_decay_step"] = tuple(max(1, round(scale * step)) for step in c.lr_decay_step)
    if c.warm_up and epochs != c.epochs:
        warm_up_epochs = round(scale * c.warm_up_epochs)
        changed |= {"warm_up_epochs": warm_up_epochs} if warm_up_epochs > 1 else {"warm_up": False}  # 1 raises nothing
    return {**settings, **changed}
