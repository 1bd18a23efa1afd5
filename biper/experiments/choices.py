"""The study of a user's own choices: changes of a recipe in a YAML file, compared on held-out training images."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from biper.errors import UsageError
from biper.experiments.plan import require_two_stages
from biper.experiments.recipe import OF_BOTH, OF_ONE_RUN, Given, Recipe, lasting
from biper.experiments.studies import Study, Variant, recipe_itself
from biper.training.distillation import require_unseen
from biper.training.inheritance import training_config
from biper.training.settings import SETTINGS, changed, load_yaml, make_settings, typed

SECTIONS = ("both", "stage1", "stage2")
ITSELF = "recipe"  # how tables call what the choices are compared with
LONGEST_NAME = 200  # bytes
FIXED = (*OF_ONE_RUN, "validation", "dataset")  # with which a choice would be no comparison


def recipe_choices(recipe: Recipe, path: Path, share: float = 1.0, seeds: Sequence[int] = (0,)) -> Study:
    """The recipe itself, and beside it every choice of a YAML file: its name, with sections both, stage1 or stage2.

    Epochs of a choice are as written, with the recipe's schedule in proportion. share: of all epochs, what is trained,
    with every schedule in proportion. Raises UsageError if the file or a setting is unfit, or if there is no validation
    split: what was chosen on the test images is not measured by them.
    """
    if not recipe.stage1.get("validation"):
        raise UsageError("choices are made on held-out training images: give --validation N, such as 5000 of CIFAR-10")
    choices = load_yaml(path)
    if not isinstance(choices, dict) or not choices:
        raise UsageError(
            f"{path}: expected the choices by name, such as 'smoothed: {{both: {{label_smoothing: 0.1}}}}'"
        )
    base = recipe_itself(recipe, ITSELF)
    variants, names = [base], {base.stages[1][0]: ITSELF}
    for title, sections in choices.items():
        if not isinstance(title, str) or not title.isprintable():
            raise UsageError(f"{path}: the name {title!r} is no text of one line: put it in quotes")
        if len(title.encode()) > LONGEST_NAME:
            raise UsageError(f"{path}: the name {title[:30]!r}... is too long: {LONGEST_NAME} bytes at most")
        key = "choice_" + re.sub(r"[^\w.]+", "_", title).strip("_")
        if title == ITSELF or key in names:
            raise UsageError(f"{path}: the name {title!r} is that of {names.get(key, 'the recipe')!r}: give another")
        names[key] = title
        variants.append(_variant(recipe, base, title, key, *_changes(sections, f"{path}, {title}")))
        _require_sound(recipe, variants[-1], f"{path}, {title}", seeds)
    listed = f"\n\n```yaml\n{path.read_text().strip()}\n```"
    short = tuple(_shortened(recipe.family, variant, share, path) for variant in variants)
    return Study("Which changes of the recipe are worth making?", ITSELF, short, listed=listed)


def _variant(recipe: Recipe, base: Variant, title: str, key: str, one: Given, two: Given) -> Variant:
    """The recipe with these changes. A stage 2 that starts from the recipe's stage 1 has a folder of another name."""
    stage2 = (key if one else f"stage2_{key}", _changed(recipe.family, 2, recipe.stage2, two))
    return Variant(
        title, {1: (key, _changed(recipe.family, 1, recipe.stage1, one)) if one else base.stages[1], 2: stage2}
    )


def _changed(family: str, stage: int, settings: Given, changes: Given) -> Given:
    return changed(lasting(family, stage, settings, changes["epochs"]) if "epochs" in changes else settings, changes)


def _shortened(family: str, variant: Variant, share: float, path: Path) -> Variant:
    """A variant with a share of its epochs. Raises UsageError if none is left."""
    stages = {}
    for stage, (key, settings) in variant.stages.items():
        epochs = make_settings(family, stage, settings).epochs
        if share * epochs < 1:
            text = f"stage {stage} of {variant.title} has {epochs} epochs, too few for so many --halvings"
            raise UsageError(f"{path}: {text}: give fewer, or more epochs")
        stages[stage] = (key, lasting(family, stage, settings, round(share * epochs)))
    return Variant(variant.title, stages)


def _require_sound(recipe: Recipe, variant: Variant, where: str, seeds: Sequence[int]) -> None:
    """Raise UsageError for a choice that would fail when it is its turn to be trained."""
    (_, one), (_, two) = variant.stages[1], variant.stages[2]
    try:
        config = training_config(recipe.family, 1, dict(one))
        make_settings(recipe.family, 2, two)
        if config.model.endswith("_32w32a"):
            raise UsageError(f"{config.model} has no weights to binarize, so it has no stage 2")
        for teacher in (settings["teacher"] for settings in (one, two) if settings.get("teacher")):
            for seed in seeds:
                require_unseen(Path(teacher), config.dataset, validation=config.validation, seed=seed)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    require_two_stages(replace(recipe, stage1=one, stage2=two), where)


def _changes(sections: Any, where: str) -> tuple[Given, Given]:  # noqa: ANN401
    """What a choice changes in stage 1 and in stage 2, which takes the network and its method from stage 1."""
    if not isinstance(sections, Mapping) or not sections or not set(sections) <= set(SECTIONS):
        raise UsageError(f"{where}: expected the sections {', '.join(SECTIONS)}, one or more of them")
    both, one, two = (typed(sections.get(name, {}), where, name) for name in SECTIONS)
    if not (both or one or two):
        raise UsageError(f"{where}: it changes nothing: give a setting, or leave it out")
    for name in (*both, *one, *two):
        if name in FIXED or SETTINGS[name].metadata["runtime"]:
            raise UsageError(f"{where}: {name} is no choice of a recipe: leave it out")
    if inherited := sorted(set(two) & set(OF_BOTH)):
        raise UsageError(f"{where}: stage 2 takes {', '.join(inherited)} from stage 1: write it under both")
    return {**both, **one}, {name: value for name, value in both.items() if name not in OF_BOTH} | two
