"""The study of a user's own choices: changes of a recipe in a YAML file, compared on held-out training images."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from biper.errors import UsageError
from biper.experiments.recipe import OF_BOTH, OF_ONE_RUN, Given, Recipe
from biper.experiments.studies import Study, Variant, recipe_itself
from biper.training.settings import SETTINGS, load_yaml, make_settings, typed

SECTIONS = ("both", "stage1", "stage2")
ITSELF = "recipe"  # how tables call what the choices are compared with
FIXED = (*OF_ONE_RUN, "validation", "dataset")  # with which a choice would be no comparison


def recipe_choices(recipe: Recipe, path: Path) -> Study:
    """The recipe itself, and beside it every choice of a YAML file: its name, with sections both, stage1 or stage2.

    Raises UsageError if the file or a setting is unfit, or if there is no validation split: what is chosen on the test
    images is not measured by them.
    """
    if not recipe.stage1.get("validation"):
        raise UsageError("choices are made on held-out training images: give --validation N, such as 5000 of CIFAR-10")
    choices = load_yaml(path)
    if not isinstance(choices, dict) or not choices:
        raise UsageError(
            f"{path}: expected the choices by name, such as 'smoothed: {{both: {{label_smoothing: 0.1}}}}'"
        )
    variants, taken = [recipe_itself(recipe, ITSELF)], dict[str, str]()
    for title, sections in choices.items():
        key = "choice_" + re.sub(r"[^\w.]+", "_", str(title)).strip("_")
        if title == ITSELF or key in taken:
            raise UsageError(f"{path}: the name {title!r} is that of {taken.get(key, 'the recipe')!r}: give another")
        taken[key] = str(title)
        one, two = _changes(sections, f"{path}, {title}")
        stage1, stage2 = {**recipe.stage1, **one}, {**recipe.stage2, **two}
        try:
            for stage, settings in ((1, stage1), (2, stage2)):
                make_settings(recipe.family, stage, settings)
        except UsageError as error:
            raise UsageError(f"{path}, {title}: {error}") from error
        variants.append(Variant(str(title), {1: (key if one else variants[0].stages[1][0], stage1), 2: (key, stage2)}))
    return Study("Which changes of the recipe are worth making?", ITSELF, tuple(variants))


def _changes(sections: Any, where: str) -> tuple[Given, Given]:  # noqa: ANN401
    """What a choice changes in stage 1 and in stage 2, which takes the network and its method from stage 1."""
    if not isinstance(sections, Mapping) or not sections or not set(sections) <= set(SECTIONS):
        raise UsageError(f"{where}: expected the sections {', '.join(SECTIONS)}, one or more of them")
    both, one, two = (typed(sections.get(name, {}), where, name) for name in SECTIONS)
    for name in (*both, *one, *two):
        if name in FIXED or SETTINGS[name].metadata["runtime"]:
            raise UsageError(f"{where}: {name} is no choice of a recipe: leave it out")
    if inherited := sorted(set(two) & set(OF_BOTH)):
        raise UsageError(f"{where}: stage 2 takes {', '.join(inherited)} from stage 1: write it under both")
    return {**both, **one}, {name: value for name, value in both.items() if name not in OF_BOTH} | two
