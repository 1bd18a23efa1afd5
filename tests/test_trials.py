"""Trials of an ablation beside each other (--jobs), and successive halving (--halvings)."""

import multiprocessing
from unittest.mock import patch

import pytest
import torch
import yaml
from conftest import THREADS
from recipes import checkpoints, interrupted_at, rows, write_recipe

from biper.commands.ablation import main as ablation_main
from biper.experiments.halving import better_half
from biper.experiments.tables import Sample
from biper.models.checkpoint import read_checkpoint
from biper.nn.quantizers import INPUT_QUANTIZERS
from biper.training.checkpoint import LATEST

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


def test_jobs_train_what_one_process_trains(flags, command, monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", str(THREADS))  # sums depend on it
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
    assert f"of {7 - len(there)} runs: choice_own/seed0/stage2: best top-1 " in out
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
    ends = {"slow end": {"stage2": {"lr": 1e-9}}, "fast end": {"stage2": {"lr": 0.1}}}
    (tmp_path / "choices.yaml").write_text(yaml.safe_dump(ends))
    flags = [*flags, "--halvings", 1, "--results_dir", out]
    assert command(*flags, entry=ablation_main)[0] == 0
    table = rows(out / "halving.csv")
    first = {row["variant"]: float(row["mean"]) for row in table if row["round"] == "1"}
    assert set(first) == {"recipe", *ends}
    better = max(sorted(ends), key=lambda title: first[title])
    assert {row["variant"] for row in table if row["round"] == "2"} == {"recipe", better}
    assert {(row["round"], row["epochs"]) for row in table} == {("1", "1 + 1"), ("2", "2 + 2")}
    for number, epochs in ((1, 1), (2, 2)):
        logged = rows(out / f"round{number}" / "metrics.csv")
        assert max(int(row["epoch"]) for row in logged) == epochs
    text = (out / "halving.md").read_text()
    assert text.count("| recipe |") == 1
    assert "--halvings 1" in text
    there = checkpoints(out)
    assert command(*flags, entry=ablation_main)[0] == 0
    assert checkpoints(out) == there


def test_of_an_odd_number_the_middle_one_is_kept():
    reached = {"recipe": 99, "a": 1, "b": 5, "c": 3}
    assert better_half({title: Sample({0: value}) for title, value in reached.items()}) == ["b", "c"]


def test_bad_input(flags, refused, tmp_path):
    flags = [*flags, "--results_dir", tmp_path / "out"]
    for argv, message in {
        ("--jobs", 0): "--jobs 0: at least 1",
        ("--halvings", 0): "--halvings 0: at least 1",
        ("--halvings", 2): "2 + 2 epochs cannot be halved 2 times: give fewer --halvings or more --epochs",
        ("--halvings", 1, "--studies", "recipe", "frequency"): "give --choices FILE.yaml, and no other --studies",
    }.items():
        assert message in refused(*flags, *argv, entry=ablation_main)
    assert not (tmp_path / "out").exists()
