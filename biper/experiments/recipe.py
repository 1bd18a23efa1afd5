"""A recipe: the settings of both stages in one YAML file, as they are or with other numbers of epochs.

The parsers import it, so it does not wait for torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from biper.data.datasets import find_dataset
from biper.errors import UsageError
from biper.training.settings import METHOD, SETTINGS, make_settings, read_yaml

Given = Mapping[str, Any]  # by name; defaults are not among them
OF_ONE_RUN = ("results_dir", "save", "resume", "evaluate", "seed", "load_ckpt_stage1", "start_epoch", "from_scratch")
FREE = ("data", "hardware")  # groups of settings that leave a recipe what it is
OF_BOTH = ("model", "freq", *METHOD, "dataset")  # which stage 2 takes from stage 1


@dataclass(frozen=True)
class Recipe:
    """The settings of both stages, without where they lie and where stage 2 starts from."""

    name: str
    family: str
    stage1: Given
    stage2: Given

    @property
    def model(self) -> str:
        """The model that both stages train."""
        return make_settings(self.family, 1, self.stage1).model

    @property
    def freq(self) -> float:
        """The frequency of both stages."""
        return make_settings(self.family, 1, self.stage1).freq

    @property
    def dataset(self) -> str:
        """The data set that both stages train on."""
        return make_settings(self.family, 1, self.stage1).dataset

    @property
    def epochs(self) -> tuple[int, int]:
        """The epochs of stage 1 and of stage 2."""
        return make_settings(self.family, 1, self.stage1).epochs, make_settings(self.family, 2, self.stage2).epochs


def read_recipe(path: Path, given: Given, family: str | None = None) -> Recipe:
    """The recipe in a YAML file with sections stage1 and stage2; `given` settings win in both of its stages.

    What belongs to a single run, such as its seed and its folder, is left out. Raises UsageError if the file or a
    setting is unfit; that there is such a model `plan` looks up, where torch is at hand.
    """
    one, two = (_section(path, stage) for stage in (1, 2))
    for name in OF_BOTH:
        value = two.pop(name, None)
        if value is not None and one.setdefault(name, value) != value:
            raise UsageError(f"{path}: {name} {value} in stage2 is not stage 1's {one[name]}, which stage 2 takes over")
    family = family or find_dataset(one.get("dataset", "cifar10")).family
    one, two = one | dict(given), two | dict(given)
    two.setdefault("dataset", make_settings(family, 1, one).dataset)
    make_settings(family, 2, two)
    recipe = Recipe(_name(path), family, one, two)
    if recipe.model.endswith("_32w32a"):
        raise UsageError(f"{path}: {recipe.model} has no weights to binarize, so it has no stage 2")
    return recipe


def _name(path: Path) -> str:
    """short_resnet20 for cifar10/configs/short/resnet20.yaml, elsewhere the file's name."""
    parts = path.resolve().with_suffix("").parts
    return "_".join(parts[parts.index("configs") + 1 :]) if "configs" in parts else path.stem


def _section(path: Path, stage: int) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"no recipe at {path}: give a YAML file such as cifar10/configs/resnet20.yaml")
    section = read_yaml(path, stage)
    if section.get("from_scratch"):
        raise UsageError(f"{path}: a recipe's stage 2 starts from stage 1, not from_scratch")
    return {name: value for name, value in section.items() if name not in OF_ONE_RUN}


def with_epochs(recipe: Recipe, epochs: tuple[int, int]) -> Recipe:
    """The recipe with other numbers of epochs, the schedule of each stage in proportion."""
    one, two = epochs
    return replace(
        recipe,
        stage1=lasting(recipe.family, 1, recipe.stage1, one),
        stage2=lasting(recipe.family, 2, recipe.stage2, two),
    )


def lasting(family: str, stage: int, settings: Given, epochs: int) -> Given:
    """A stage's settings with another number of epochs, warm-up and steps of the learning rate in proportion."""
    c = make_settings(family, stage, settings)
    if epochs == c.epochs:
        return settings
    scale = epochs / c.epochs
    changed: dict[str, Any] = {"epochs": epochs}
    if c.lr_decay_step:
        changed["lr_decay_step"] = tuple(round(scale * step) for step in c.lr_decay_step)
    if c.warm_up:
        warm_up_epochs = round(scale * c.warm_up_epochs)
        changed |= {"warm_up_epochs": warm_up_epochs} if warm_up_epochs > 1 else {"warm_up": False}  # 1 raises nothing
    return {**settings, **changed}


def decides(name: str) -> bool:
    """Whether a setting belongs in a recipe: it decides what is computed, and is no path of a machine."""
    return name not in OF_ONE_RUN and not SETTINGS[name].metadata["runtime"]
