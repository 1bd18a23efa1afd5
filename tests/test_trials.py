"""Trials of an ablation beside each other (--jobs), and successive halving (--halvings)."""

import multiprocessing
import re
from unittest.mock import patch

import pytest
import torch
import yaml
from recipes import checkpoints, interrupted_at, rows, write_recipe

from biper.commands.ablation import main as ablation_main
from biper.errors import UsageError
from biper.experiments.choices import recipe_choices
from biper.experiments.halving import better_half
from biper.experiments.recipe import read_recipe
from biper.experiments.tables import Sample
from biper.models.checkpoint import read_checkpoint
from biper.nn.quantizers import INPUT_QUANTIZERS
from biper.training.checkpoint import LATEST
from biper.training.settings import make_settings

OWN = """
import biper

@biper.register_quantizer("mine")
class Mine(biper.PolynomialSign):
    \"\"\"BiPer's, under another name.\"\"\"
"""
CHOICES = {
    "too fast": {"stage1": {"lr": 1e30}},
    "own": {"both": {"input_quantizer": "mine"}},
}


@pytest.fixture
def flags(tmp_path):
    """A recipe of 2 + 2 epochs of few steps, its choices, and images held out."""
    recipe = write_recipe(tmp_path, {"batch_size": 512}, epochs=2, batch_size=512, warm_up=False)
    choices = tmp_path / "choices.yaml"
    choices.write_text(yaml.safe_dump(CHOICES, sort_keys=False))
    own = tmp_path / "own.py"
    own.write_text(OWN)
    with patch.dict(INPUT_QUANTIZERS):
        yield [recipe, "--choices", choices, "--validation", 200, "--import", own]


def test_jobs_train_what_one_process_trains(flags, command, tmp_path):
    torch.set_num_threads(1)  # as jobs have; sums depend on it
    flags = [*flags, "--studies", "two_stages", "recipe", "--epochs", 1, 1]
    beside = [*flags, "--jobs", 2, "--results_dir", tmp_path / "beside"]
    with interrupted_at("3 of 7 runs: "):
        assert command(*beside, entry=ablation_main)[0] == 130
    assert not multiprocessing.active_children()
    there = {path for path in checkpoints(tmp_path / "beside") if path.name == LATEST}
    assert there  # some of the three: one diverges, and what starts from it is none
    code, out, err = command(*beside, entry=ablation_main)
    assert code == 1
    assert "recipe: too fast, seed 0" in err
    left = re.search(r"of (\d) runs: choice_own/seed0/stage2: best top-1 ", out)
    assert left
    assert 7 - len(there) <= int(left[1]) < 7  # one may have been stopped between its last checkpoint and its end
    assert command(*flags, "--results_dir", tmp_path / "alone", entry=ablation_main)[0] == 1
    runs = [
        sorted(path.relative_to(tmp_path / name) for path in checkpoints(tmp_path / name))
        for name in ("beside", "alone")
    ]
    assert runs[0] == runs[1]
    for path in runs[0]:
        one, other = (read_checkpoint(tmp_path / name / path) for name in ("beside", "alone"))
        assert all(torch.equal(other["state_dict"][key], tensor) for key, tensor in one["state_dict"].items())
    for study in ("two_stages.csv", "recipe.csv"):
        assert (tmp_path / "beside" / study).read_text() == (tmp_path / "alone" / study).read_text()


def test_the_better_half_goes_on_for_twice_as_long(flags, command, tmp_path):
    out = tmp_path / "out"
    ends = {"slow end": {"stage2": {"lr": 1e-9}}, "fast end": {"stage2": {"lr": 0.1, "epochs": 4}}}
    (tmp_path / "choices.yaml").write_text(yaml.safe_dump(ends, sort_keys=False))
    flags = [*flags, "--halvings", 1, "--results_dir", out]
    code, printed, _ = command(*flags, entry=ablation_main)
    assert code == 0
    assert "== round 1 of 2: 1 + 1 epochs" in printed
    table = rows(out / "halving.csv")
    first = {row["variant"]: float(row["mean"]) for row in table if row["round"] == "1"}
    assert set(first) == {"recipe", *ends}
    better = max(ends, key=lambda title: first[title])  # of equals the first
    assert {row["variant"] for row in table if row["round"] == "2"} == {"recipe", better}
    epochs = {(row["variant"], row["round"]): row["epochs"] for row in table}
    assert (epochs["recipe", "1"], epochs["recipe", "2"]) == ("1 + 1", "2 + 2")
    assert epochs["fast end", "1"] == "1 + 2"
    for number, epochs in ((1, 2), (2, 4 if better == "fast end" else 2)):
        logged = rows(out / f"round{number}" / "metrics.csv")
        assert max(int(row["epoch"]) for row in logged) == epochs
    text = (out / "halving.md").read_text()
    assert text.count("| recipe |") == 1
    assert "(1 + 2 epochs)" in text
    assert "--halvings 1" in text
    there = checkpoints(out)
    assert command(*flags, entry=ablation_main)[0] == 0
    assert checkpoints(out) == there


@pytest.mark.parametrize(
    ("reached", "better"),
    [
        ({"recipe": [99], "a": [1], "b": [5], "c": [3]}, ["b", "c"]),  # of an odd number the middle one is kept
        ({"d": [5], "recipe": [5], "c": [5], "b": [5], "a": [5]}, ["d", "c"]),  # of equals the first
        ({"lucky": [9], "sound": [5, 5]}, ["sound"]),  # one has diverged with a seed
    ],
)
def test_the_better_half(reached, better):
    assert better_half({title: Sample(dict(enumerate(values))) for title, values in reached.items()}) == better


def test_a_share_shortens_every_schedule(tmp_path):
    choice = {"stage1": {"epochs": 40, "lr_type": "step", "lr_decay_step": [20, 30], "warm_up": True}}
    (tmp_path / "choices.yaml").write_text(yaml.safe_dump({"steps": choice}))
    recipe = read_recipe(write_recipe(tmp_path), {"validation": 200})
    base, steps = recipe_choices(recipe, tmp_path / "choices.yaml", 0.5).variants
    one, two = (make_settings("cifar10", 1, variant.stages[1][1]) for variant in (base, steps))
    assert (one.epochs, one.warm_up_epochs) == (2, 2)  # of 4
    assert (two.epochs, two.lr_decay_step, two.warm_up_epochs) == (20, (10, 15), 20)
    with pytest.raises(UsageError, match="stage 2 of recipe has 2 epochs, too few for so many --halvings"):
        recipe_choices(recipe, tmp_path / "choices.yaml", 0.25)


def test_bad_input(flags, refused, tmp_path):
    flags = [*flags, "--results_dir", tmp_path / "out"]
    for argv, message in {
        ("--jobs", 0): "--jobs 0: at least 1",
        ("--jobs", 10**11): "--jobs 100000000000: at least 1, and at most 10000",
        ("--halvings", 0): "--halvings 0: at least 1",
        ("--halvings", 2): "stage 1 of recipe has 2 epochs, too few for so many --halvings: give fewer",
        ("--halvings", 1, "--studies", "recipe", "frequency"): "give --choices FILE.yaml, and no other --studies",
    }.items():
        assert message in refused(*flags, *argv, entry=ablation_main)
    assert not (tmp_path / "out").exists()
