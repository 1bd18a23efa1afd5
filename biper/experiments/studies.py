"""The questions of an ablation, and the variants of a recipe that answer them on equal terms.

STUDIES, at the end, are those that ablation.py knows. The parser imports them, so nothing here waits for torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from biper.errors import UsageError
from biper.experiments.recipe import Given, Recipe, lasting
from biper.nn import fitted
from biper.training.settings import make_settings

FROM_START = "binary_from_start"  # the folder of runs that several studies share
FREQUENCIES = (5.0, 10.0, 20.0, 30.0, 40.0)
FREQUENCY_SCALES = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Variant:
    """A way to train: the settings of its stages by number, each with the folder of its runs (shared by variants)."""

    title: str
    stages: dict[int, tuple[str, Given]]

    def homes(self, seed: int, folder: Path) -> dict[int, Path]:
        """The folders of its stages with a seed, by number, in the folder of an ablation."""
        return {s: folder / "runs" / key / f"seed{seed}" / f"stage{s}" for s, (key, _) in self.stages.items()}


@dataclass(frozen=True)
class Study:
    """A question and the variants that answer it; the others' differences are from the one called `base`.

    over_freq: the variants are frequencies, to be drawn along an axis and layer by layer; histograms: where the weights
    lie is drawn too; listed: what a table says of the variants, after the command.
    """

    question: str
    base: str
    variants: tuple[Variant, ...]
    over_freq: bool = False
    histograms: bool = False
    listed: str = ""

    def only(self, titles: Sequence[str]) -> "Study":
        """The study of these variants and of its base. Raises UsageError for one that it lacks."""
        known = [variant.title for variant in self.variants]
        if unknown := [title for title in titles if title not in known]:
            raise UsageError(f"no variant is called {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
        return replace(self, variants=tuple(v for v in self.variants if v.title in (*titles, self.base)))


def recipe_itself(recipe: Recipe, title: str) -> Variant:
    """The recipe as it is, with which most studies compare: they share its runs."""
    return Variant(title, _both(recipe, _frequency_key(recipe.freq)))


def _both(recipe: Recipe, key: str, **changes: object) -> dict[int, tuple[str, Given]]:
    """Both stages, with the same changes."""
    return {1: (key, {**recipe.stage1, **changes}), 2: (key, {**recipe.stage2, **changes})}


def _inherited(recipe: Recipe, key: str, **changes: object) -> dict[int, tuple[str, Given]]:
    """Both stages, with changes of stage 1 that stage 2 takes from its checkpoint."""
    return {1: (key, {**recipe.stage1, **changes}), 2: (key, recipe.stage2)}


def _frequency_key(freq: float) -> str:
    return f"freq_{freq:g}"


def _require_biper(recipe: Recipe, what: str) -> None:
    """Raise UsageError for a recipe whose quantizer is another than BiPer's with one frequency."""
    if recipe.stage1.get("quantizer", "biper") != "biper":
        raise UsageError(f"the study of {what} compares with biper: leave quantizer and freq_scale out of the recipe")


def frequency(recipe: Recipe) -> Study:
    """Stage 1, and with it stage 2, at several frequencies. Raises UsageError for another quantizer than BiPer's."""
    _require_biper(recipe, "frequencies")
    variants = []
    for freq in sorted({*FREQUENCIES, recipe.freq}):
        variants.append(Variant(f"freq {freq:g}", _inherited(recipe, _frequency_key(freq), freq=freq)))
    question = "How does the frequency decide accuracy and quantization error?"
    return Study(question, f"freq {recipe.freq:g}", tuple(variants), over_freq=True)


def freq_scale(recipe: Recipe) -> Study:
    """One frequency for all layers, and each layer's own: a number over the standard deviation of its fresh weights.

    Raises UsageError for another quantizer than BiPer's.
    """
    _require_biper(recipe, "frequencies")
    base = recipe_itself(recipe, f"freq {recipe.freq:g}")
    variants = [base]
    for scale in FREQUENCY_SCALES:
        key = f"freq_scale_{scale:g}"
        variants.append(Variant(f"freq {scale:g} / std(w)", _inherited(recipe, key, quantizer=fitted(scale))))
    return Study("Does a frequency that fits each layer do better than one for all?", base.title, tuple(variants))


def two_stages(recipe: Recipe) -> Study:
    """Binary weights from the start, with stage 1's settings for as many epochs as both stages have."""
    base = recipe_itself(recipe, "two stages")
    whole = lasting(recipe.family, 1, recipe.stage1, sum(recipe.epochs))
    start = Variant("binary from the start", {2: (FROM_START, {**whole, **_fresh(recipe)})})
    question = "Are two stages better than binary weights from the start, in as many epochs?"
    return Study(question, base.title, (base, start))


def warm_start(recipe: Recipe) -> Study:
    """A stage 2 that starts from fresh weights."""
    base = recipe_itself(recipe, "warm start")
    cold = Variant("fresh start", {2: ("fresh_start", {**recipe.stage2, **_fresh(recipe)})})
    question = "Does stage 2 need the weights of stage 1, or would fresh ones do in its epochs?"
    return Study(question, base.title, (base, cold))


def _fresh(recipe: Recipe) -> Given:
    """What stage 2 must be told where there is no stage 1 to take it from."""
    return {"from_scratch": True, "model": recipe.model, "freq": recipe.freq}


def regularizer(recipe: Recipe) -> Study:
    """Both stages as published, without, and with the opposite; one of the three is the recipe itself."""
    forms = {
        "sin², published": _both(recipe, "regularizer_sin2", regularizer=True, regularizer_form="sin2"),
        "off": _both(recipe, "regularizer_off", regularizer=False),
        "cos², opposite": _both(recipe, "regularizer_cos2", regularizer=True, regularizer_form="cos2"),
    }
    both = [make_settings(recipe.family, stage, s) for stage, s in ((1, recipe.stage1), (2, recipe.stage2))]
    kinds = {c.regularizer_form if c.regularizer else "off" for c in both}
    own = {"sin2": "sin², published", "off": "off", "cos2": "cos², opposite"}[kinds.pop()] if len(kinds) == 1 else ""
    variants = tuple(
        recipe_itself(recipe, title) if title == own else Variant(title, stages) for title, stages in forms.items()
    )
    question = "What does the periodic regularizer do, and would its opposite, which pulls to -1 and +1, do better?"
    return Study(question, "sin², published", variants)


def learning_rate(recipe: Recipe) -> Study:
    """Each stage's varied; stage 2's from the same stage 1."""
    one, two = (
        make_settings(recipe.family, s, settings).lr for s, settings in ((1, recipe.stage1), (2, recipe.stage2))
    )
    base = recipe_itself(recipe, f"{one:g}, {two:g}")
    variants = [base]
    for factor in (0.5, 2.0):
        stages = _inherited(recipe, f"stage1_lr_{factor * one:g}", lr=factor * one)
        variants.append(Variant(f"{factor * one:g}, {two:g}", stages))
    for factor in (0.2, 5.0):
        stages = {1: base.stages[1], 2: (f"stage2_lr_{factor * two:g}", {**recipe.stage2, "lr": factor * two})}
        variants.append(Variant(f"{one:g}, {factor * two:g}", stages))
    question = "Are the learning rates of stage 1 and of stage 2 the best ones?"
    return Study(question, base.title, tuple(variants))


def quantizers(recipe: Recipe) -> Study:
    """Every registered weight quantizer, those of one stage with stage 1's settings for as many epochs as both have.

    A class that takes another's place in stage 2 is no method of its own. Raises UsageError for a recipe of another
    quantizer than BiPer's, and, before anything is trained, for a quantizer of somebody's own that fails.
    """
    from biper.models.methods import BIPER, own_methods, require_second_stage, require_sound  # torch loads here

    _require_biper(recipe, "quantizers")
    whole = {**lasting(recipe.family, 1, recipe.stage1, sum(recipe.epochs)), **_fresh(recipe)}
    base = recipe_itself(recipe, BIPER)
    variants = [base, Variant(f"{BIPER}, one stage", {2: (FROM_START, whole)})]
    tried = {name: require_sound(name, recipe.freq) for name in own_methods()}
    for name, quantizer in tried.items():
        require_second_stage(name, quantizer)
    seconds = {type(q.binarized()) for q in tried.values() if not q.binary}
    for name, quantizer in tried.items():
        if type(quantizer) in seconds:
            continue
        key = f"quantizer_{name}"
        from_start: dict[int, tuple[str, Given]] = {2: (key, {**whole, "quantizer": name})}
        variants.append(Variant(name, from_start if quantizer.binary else _inherited(recipe, key, quantizer=name)))
    question = "Which weight quantizer is best under one recipe, in as many epochs?"
    return Study(question, base.title, tuple(variants), histograms=True)


def input_quantizers(recipe: Recipe) -> Study:
    """Every registered input quantizer, in both stages; one of them is the recipe's."""
    from biper.models.methods import input_methods, require_sound_inputs  # torch loads here

    for name in input_methods():
        require_sound_inputs(name)
    return _over(recipe, "input_quantizer", input_methods(), "Which input quantizer is best under one recipe?")


def activations(recipe: Recipe) -> Study:
    """The activations that do not make every sign +1, in both stages; one of them is the recipe's."""
    return _over(recipe, "activation", ("hardtanh", "prelu", "rprelu"), "Which activation is best under one recipe?")


def _over(recipe: Recipe, setting: str, values: Sequence[str], question: str) -> Study:
    """Both stages with each value of a setting, which stage 2 takes from stage 1, the recipe's own among them."""
    from biper.models.methods import method_of_model  # torch loads here

    own = recipe.stage1.get(setting) or method_of_model(recipe.model, recipe.family)[setting]
    if not own:
        raise UsageError(f"{recipe.model} has real activations: there is no {setting} to vary")
    variants = [
        recipe_itself(recipe, value)
        if value == own
        else Variant(value, _inherited(recipe, f"{setting}_{value}", **{setting: value}))
        for value in dict.fromkeys((*values, own))
    ]
    return Study(question, own, tuple(variants))


CHOICES = "recipe"  # the study of a user's own choices, which needs their file: choices.recipe_choices
BIPER_STUDIES = (
    "frequency",
    "two_stages",
    "warm_start",
    "regularizer",
    "learning_rate",
)  # where no other are asked for
STUDIES: Mapping[str, Callable[[Recipe], Study]] = {  # by the name of the flag, which is that of the files too
    "frequency": frequency,
    "two_stages": two_stages,
    "warm_start": warm_start,
    "regularizer": regularizer,
    "learning_rate": learning_rate,
    "freq_scale": freq_scale,
    "quantizers": quantizers,
    "input_quantizers": input_quantizers,
    "activations": activations,
}
