"""An experiment: a recipe, seeds and a folder, and what it says of itself beside what the paper trained."""

import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biper.data.datasets import find_dataset
from biper.errors import UsageError
from biper.experiments.recipe import FREE, Recipe, read_recipe, with_epochs
from biper.models import list_models
from biper.models.methods import BIPER, require_second_stage, require_sound
from biper.models.published import EPOCHS, TOP1
from biper.models.registry import unknown_model
from biper.places import RECIPES
from biper.training.settings import SETTINGS, make_settings

log = logging.getLogger("biper")


@dataclass(frozen=True)
class Experiment:
    """What is to be done, and how it is called.

    recipe: as it is run; full_epochs: those of its file; data: what the data are called in tables; command: what does
    it all, with FOLDER for the place of the data.
    """

    recipe: Recipe
    full_epochs: tuple[int, int]
    seeds: tuple[int, ...]
    folder: Path
    data: str
    command: str

    @property
    def published_top1(self) -> float | None:
        """The paper's top-1 in percent, where it trained this model on these data, at their size."""
        r = self.recipe
        same = r.dataset == r.family and r.stage1.get("image_size") is None
        return TOP1.get((r.family, r.model)) if same else None

    @property
    def published_epochs(self) -> str:
        """The epochs of the paper's recipe for this family."""
        return epochs_text(EPOCHS[self.recipe.family])

    @property
    def short(self) -> str:
        """One sentence on how short it is; empty if it trains as long as the paper."""
        if _shorter(self.recipe.epochs, self.full_epochs):
            return f"**A short run**: the recipe has {epochs_text(self.full_epochs)} epochs."
        if _shorter(self.recipe.epochs, EPOCHS[self.recipe.family]):
            return f"**A short run**: the paper's recipe of ResNet-18 has {self.published_epochs} epochs."
        return ""

    def announce(self) -> None:
        """Say in the log what is about to be done."""
        seeds = ", ".join(map(str, self.seeds))
        text = "%s on %s: %s epochs, seeds %s, results in %s"
        log.info(text, self.recipe.model, self.data, epochs_text(self.recipe.epochs), seeds, self.folder)

    def require_folder(self, inside: str) -> None:
        """Raise UsageError unless the folder is new, empty, or of such an experiment: with `inside` in it."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file: give another --results_dir")
        if self.folder.exists() and any(self.folder.iterdir()) and not any(self.folder.glob(inside)):
            raise UsageError(f"{self.folder} holds something else: give another --results_dir")

    def preface(self) -> str:
        """Recipe, data and command."""
        what = f"`{self.recipe.model}` on {self.data}, {epochs_text(self.recipe.epochs)} epochs. {self.short}".rstrip()
        held = self.recipe.stage1.get("validation", 0)
        if held:
            what += f" **Measured on {held:,} training images that were held out**, by seed; no test image was read."
        return f"{what}\n\n```bash\n{self.command}\n```"


def epochs_text(epochs: tuple[int, int]) -> str:
    """The epochs of both stages."""
    return f"{epochs[0]} + {epochs[1]}"


def _shorter(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return any(a < b for a, b in zip(one, other, strict=True))


def planned(kind: str, given: Mapping[str, Any], prog: str = "") -> Experiment:
    """The experiment that the flags of `reproduce` or `ablation`, its kind, describe.

    prog: how the command was called, reproduce.py or `biper reproduce`. Raises UsageError if the flags are unfit.
    """
    settings = {name: given[name] for name, f in SETTINGS.items() if f.metadata["group"] in FREE and name in given}
    full = read_recipe(given["recipe"], settings, given.get("family"))
    if full.model not in list_models(full.family):
        raise UsageError(f"{given['recipe']}: {unknown_model(full.model, full.family)}")
    require_two_stages(full, str(given["recipe"]))
    if kind == "reproduce" and full.stage1.get("validation"):
        raise UsageError("--validation is for choices, in training and ablation: what is released saw all images")
    seeds = tuple(given["seeds"])
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {' '.join(map(str, seeds))}: give each seed once")
    for seed in seeds:
        make_settings(full.family, 1, {**full.stage1, "seed": seed})
    recipe = with_epochs(full, _epochs(full.epochs, given))
    place = Path(settings.get("data_path", "")).name if recipe.dataset == "folder" else ""
    label = "_".join(filter(None, [recipe.name, recipe.dataset, place, epochs_text(recipe.epochs).replace(" ", "")]))
    return Experiment(
        recipe=recipe,
        full_epochs=full.epochs,
        seeds=seeds,
        folder=given.get("results_dir", Path("results") / (label if kind == "reproduce" else f"{kind}_{label}")),
        data=given.get("data_name") or find_dataset(recipe.dataset).title,
        command=_command(prog or f"{kind}.py", given),
    )


def require_two_stages(recipe: Recipe, where: str) -> None:
    """Raise UsageError for a recipe whose quantizer has one stage."""
    name = recipe.stage1.get("quantizer", BIPER)
    quantizer = require_sound(name, recipe.freq)
    require_second_stage(name, quantizer)
    if quantizer.binary:
        text = f"{where}: quantizer {name} is binary from the start, and a recipe has two stages"
        raise UsageError(f"{text}: ablation.py --studies quantizers trains it over seeds")


def _epochs(full: tuple[int, int], given: Mapping[str, Any]) -> tuple[int, int]:
    scale = given.get("epochs_scale", 1.0)
    if not 0 < scale <= 1:
        raise UsageError(f"--epochs_scale {scale}: above 0, at most 1")
    one, two = given.get("epochs", (max(1, round(scale * epochs)) for epochs in full))
    if min(one, two) < 1:
        raise UsageError(f"--epochs {one} {two}: at least 1 each")
    return one, two


def _command(prog: str, given: Mapping[str, Any]) -> str:
    """The command line, without where results and data lie on this machine."""
    words = [*(["python"] if prog.endswith(".py") else []), *prog.split(), _shown_path(given["recipe"])]
    words += [word for path in given.get("import", []) for word in ("--import", path.name)]
    for name, value in given.items():
        if name in ("recipe", "results_dir", "import"):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
            continue
        if name == "choices":
            value = value.name
        values = value if isinstance(value, list) else ["FOLDER" if name == "data_path" else value]
        words += [f"--{name}", *map(str, values)]
    return shlex.join(words)


def _shown_path(path: Path) -> str:
    """A recipe that comes with biper as it is given from the repository's folder, another by its name."""
    ours = path.resolve().is_relative_to(RECIPES)
    return str(path.resolve().relative_to(RECIPES)) if ours else path.name
