"""Recipes: read, refused, with other numbers of epochs; what is said of them."""

import pytest
from conftest import ROOT
from recipes import write_recipe

from biper.commands.reproduce import build_parser
from biper.commands.reproduce import main as reproduce_main
from biper.experiments.plan import planned
from biper.experiments.recipe import read_recipe, with_epochs
from biper.training.schedule import lr_at


def test_published_figures_stand_beside_the_same_network_on_the_same_data_alone():
    def published(recipe, *flags):
        return planned(
            "reproduce", vars(build_parser("reproduce.py").parse_args([str(ROOT / recipe), *flags]))
        ).published_top1

    assert published("cifar10/configs/resnet20.yaml") == 87.5
    assert published("imagenet/configs/resnet18.yaml") == 61.4
    assert published("cifar10/configs/resnet18.yaml", "--dataset", "digits") is None
    assert published("cifar10/configs/resnet18.yaml", "--dataset", "imagenet") is None
    assert published("imagenet/configs/resnet18.yaml", "--image_size", "64") is None


def test_schedules_are_shortened_in_proportion(tmp_path):
    path = write_recipe(tmp_path, epochs=200, warm_up_epochs=10, lr_type="step", lr_decay_step=[100, 150])
    recipe = with_epochs(read_recipe(path, {}), (20, 2))
    one, two = recipe.stage1, recipe.stage2
    assert (one["epochs"], one["lr_decay_step"], one["warm_up"]) == (20, (10, 15), False)  # one epoch raises nothing
    assert two == read_recipe(path, {}).stage2
    one = with_epochs(read_recipe(path, {}), (100, 2)).stage1
    assert (one["warm_up"], one["warm_up_epochs"]) == (True, 5)
    assert lr_at(4, lr=1.0, epochs=100, warm_up=True, warm_up_epochs=one["warm_up_epochs"]) == 1.0


def test_shipped_recipes_shortened_reach_a_small_rate():
    for path in (ROOT / "cifar10" / "configs").rglob("*.yaml"):
        recipe = read_recipe(path, {})
        short = with_epochs(recipe, tuple(max(1, round(0.02 * epochs)) for epochs in recipe.epochs)).stage1
        if short["epochs"] == 1:
            continue
        names = ("lr", "epochs", "lr_type", "warm_up", "warm_up_epochs")
        settings = {name: short[name] for name in names if name in short}
        rates = [lr_at(epoch, **settings) for epoch in range(short["epochs"])]
        assert max(rates) == short["lr"]
        assert rates[-1] <= short["lr"] * 0.6


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "1", "1"], "each seed once"),
        (["--seeds", "0", "-1"], "--seed -1 is too small"),
        (["--epochs_scale", "0"], "above 0, at most 1"),
        (["--epochs_scale", "nan"], "above 0, at most 1"),
        (["--lr", "1"], "unrecognized arguments"),
        (["--epochs", "1", "1", "--epochs_scale", "0.5"], "not allowed with"),
        (["--dataset", "folder", "--data_path", "nowhere"], "--data_path is not a folder"),
    ],
)
def test_bad_input_of_reproduce(refused, tmp_path, argv, message):
    out = tmp_path / "out"
    assert message in refused(write_recipe(tmp_path), "--results_dir", out, *argv, entry=reproduce_main)
    assert not out.exists()
