"""reproduce.py, whole, on 8x8 digits."""

import json
import math
import shutil
import statistics

import pytest
import torch
import yaml
from conftest import THREADS
from recipes import SEEDS, best, checkpoints, interrupted_at, rows, write_recipe

from biper.commands.ablation import main as ablation_main
from biper.commands.reproduce import main as reproduce_main
from biper.errors import TrainingDiverged
from biper.experiments import run as runs
from biper.experiments.recipe import read_recipe
from biper.experiments.tables import Sample
from biper.models.checkpoint import read_checkpoint
from biper.packed.file import read
from biper.training.checkpoint import BEST, LATEST


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """Two seeds of the recipe at half its length: 2 + 1 epochs."""
    torch.set_num_threads(THREADS)  # as in the tests that go on with it
    folder = tmp_path_factory.mktemp("reproduced")
    argv = [write_recipe(folder), *SEEDS, "--epochs_scale", 0.5, "--results_dir", folder / "out"]
    reproduce_main([str(a) for a in argv])
    return folder


def test_the_table_is_made_of_the_metrics(reproduced):
    out = reproduced / "out"
    metrics = rows(out / "metrics.csv")
    table = {row["quantity"]: row for row in rows(out / "results.csv")}
    text = (out / "results.md").read_text()
    for stage in (1, 2):
        values = [best(metrics, seed=seed, stage=stage) for seed in (0, 3)]
        row = table[f"stage{stage}_top1"]
        assert [float(row["seed_0"]), float(row["seed_3"])] == values
        assert float(row["mean"]) == pytest.approx(statistics.fmean(values))
        assert float(row["std"]) == pytest.approx(statistics.stdev(values))
        assert row["n"] == "2"
        assert row["published"] == ""  # the paper did not train on digits
        assert f"| {statistics.fmean(values):.2f} | {statistics.stdev(values):.2f} | 2 | - |" in text
    assert "**A short run**: the recipe has 4 + 2 epochs." in text
    assert "python reproduce.py tiny.yaml --seeds 0 3 --epochs_scale 0.5\n" in text
    for name in ("learning_curves.png", "quantization_error.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_what_is_released_evaluates_to_the_number_on_its_card(reproduced, command):
    release = reproduced / "out" / "seed3" / "release"
    facts = json.loads((release / "result.json").read_text())
    card = (release / "README.md").read_text()
    shown = f"{best(rows(release / 'metrics.csv'), stage=2):.2f}"
    assert f"**{shown} %**" in card
    assert f"{facts['packed_top1']:.2f}" == shown
    for name in ("model.pth.tar", "packed.safetensors"):
        code, out, err = command("-e", release / name, family=None, stage=None)
        assert code == 0, err
        assert f"top-1 {shown} %" in out
    section = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert (section["stage1"]["lr"], section["stage2"]["tau_max"]) == (0.05, 0.02)
    (entry,) = yaml.safe_load(card.split("---\n")[1])["model-index"]
    (found,) = entry["results"]
    assert (entry["name"], found["dataset"]["type"]) == ("resnet20_1w1a", "digits")
    assert f"{found['metrics'][0]['value']:.2f}" == shown


def test_the_released_checkpoint_is_small_and_names_no_paths(reproduced):
    path = reproduced / "out" / "seed0" / "release" / "model.pth.tar"
    contents = read_checkpoint(path)
    assert "optimizer" not in contents
    assert str(reproduced) not in str(contents["settings"])
    assert str(reproduced) not in path.with_name("README.md").read_text()
    assert path.stat().st_size < 1_200_000
    whole = read_checkpoint(reproduced / "out" / "seed0" / "stage2" / BEST)["state_dict"]
    assert all(torch.equal(tensor, contents["state_dict"][name]) for name, tensor in whole.items())


def test_what_is_there_is_not_run_again(reproduced, command, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(reproduced / "out", moved)
    table = (moved / "results.csv").read_text()
    before = checkpoints(moved)
    argv = [reproduced / "tiny.yaml", *SEEDS, "--epochs_scale", 0.5, "--results_dir", moved]
    code, _, err = command(*argv, entry=reproduce_main)
    assert code == 0, err
    assert checkpoints(moved) == before
    assert (moved / "results.csv").read_text() == table


@pytest.mark.parametrize("line", ["epoch 1/2  lr", "best top-1"])
def test_interrupted_and_taken_up_again(reproduced, command, tmp_path, line):
    """After the first epoch, and after stage 1: the second seed's run ends as the uninterrupted one did."""
    argv = [reproduced / "tiny.yaml", "--seeds", 3, "--epochs_scale", 0.5, "--results_dir", tmp_path]
    with interrupted_at(line):
        code, _, err = command(*argv, entry=reproduce_main)
    assert code == 130
    assert "the same command goes on from there" in err
    assert command(*argv, entry=reproduce_main)[0] == 0
    for stage in (1, 2):
        one, two = (folder / f"seed3/stage{stage}/metrics.csv" for folder in (tmp_path, reproduced / "out"))
        assert one.read_text() == two.read_text()


def test_a_release_is_made_anew_if_its_run_is_another(reproduced, command, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(reproduced / "out", out)
    argv = [reproduced / "tiny.yaml", *SEEDS, "--epochs_scale", 0.5, "--results_dir", out]
    facts = out / "seed0" / "release" / "result.json"
    whole = facts.read_text()
    facts.write_text(whole[:100])  # as a full disk leaves it
    assert command(*argv, entry=reproduce_main)[0] == 0
    assert {**json.loads(facts.read_text()), "sha256": 0} == {**json.loads(whole), "sha256": 0}
    contents = read_checkpoint(out / "seed3" / "stage2" / BEST)
    contents["state_dict"]["linear.bias"][0] += 100  # now it sees one class alone
    torch.save(contents, out / "seed3" / "stage2" / BEST)
    assert command(*argv, entry=reproduce_main)[0] == 0
    release = json.loads((out / "seed3" / "release" / "result.json").read_text())
    assert release["float_top1"] == release["packed_top1"] == pytest.approx(100 * 36 / 360, abs=1)
    packed = out / "seed3" / "release" / "packed.safetensors"
    packed.write_bytes(packed.read_bytes()[:1000])
    assert command(*argv, entry=reproduce_main)[0] == 0
    assert read(packed).top1 == contents["history"][-1]["test_top1"]


def test_seconds_are_those_that_the_checkpoints_know(reproduced, command, tmp_path):
    """An earlier version of biper kept none: what is not known is shown as -, and counts for no mean."""
    shutil.copytree(reproduced / "out" / "seed0", tmp_path / "out" / "seed0")
    shutil.rmtree(tmp_path / "out" / "seed0" / "release")
    for stage, seconds in ((1, {"seconds": [None, 2.5]}), (2, {})):
        path = tmp_path / "out" / "seed0" / f"stage{stage}" / LATEST
        contents = read_checkpoint(path)
        contents.pop("seconds", None)
        torch.save(contents | seconds, path)
    argv = [reproduced / "tiny.yaml", "--epochs_scale", 0.5, "--results_dir", tmp_path / "out"]
    code, _, err = command(*argv, entry=reproduce_main)
    assert code == 0, err
    table = {row["quantity"]: row for row in rows(tmp_path / "out" / "results.csv")}
    found = {stage: [table[f"stage{stage}_seconds"][name] for name in ("n", "mean", "seed_0")] for stage in (1, 2)}
    assert found == {1: ["1", "2.5", "2.5"], 2: ["0", "", ""]}
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| seconds an epoch of stage 1, median | 2.5 | - | 1 | - |" in text
    assert "| seconds an epoch of stage 2, median | - | - | 0 | - |" in text
    assert "| training time | - |" in (tmp_path / "out" / "seed0" / "release" / "README.md").read_text()


def test_what_is_not_known_counts_for_no_mean():
    sample = Sample({0: 1.0, 1: math.nan, 2: 3.0})
    assert (sample.n, sample.mean, str(sample)) == (2, 2.0, "2.00 ± 1.41")
    assert sample.columns([0, 1, 4])["seed_1"] is None


def test_a_seed_that_diverges_is_left_out_and_named(reproduced, command, tmp_path, monkeypatch):
    train = runs.train

    def diverging(config):
        if config.seed == 1:
            raise TrainingDiverged("the loss is nan")
        return train(config)

    monkeypatch.setattr(runs, "train", diverging)
    shutil.copytree(reproduced / "out", tmp_path / "out")
    flags = [reproduced / "tiny.yaml", "--epochs_scale", 0.5, "--results_dir", tmp_path / "out", "--seeds", 1, 0, 3]
    code, out, err = command(*flags, entry=reproduce_main)
    assert code == 1
    assert "training diverged with the seeds [1]" in err
    assert "seed 1 is left out: the loss is nan" in out
    assert rows(tmp_path / "out" / "results.csv") == rows(reproduced / "out" / "results.csv")


def test_a_recipe_that_names_its_data(image_folder, command, tmp_path):
    """Data and hardware that stand in the recipe hold for the evaluation too, and not in what is given away."""
    data = {"dataset": "folder", "data_path": str(image_folder), "image_size": 8, "batch_size": 4, "device": "cpu"}
    path = write_recipe(tmp_path, data, **data)
    argv = [path, "--epochs", 1, 1, "--results_dir", tmp_path / "out", "--data_name", "lights"]
    code, _, err = command(*argv, entry=reproduce_main)
    assert code == 0, err
    assert "# resnet20_1w1a on lights" in (tmp_path / "out" / "results.md").read_text()
    card = (tmp_path / "out" / "seed0" / "release" / "README.md").read_text()
    assert "eval.sh HERE/model.pth.tar --data_path FOLDER" in card
    assert str(tmp_path) not in card
    recipe = tmp_path / "card.yaml"
    recipe.write_text(card.split("```yaml\n")[1].split("```")[0])
    assert read_recipe(recipe, {}).epochs == (1, 1)


def test_no_table_loses_a_seed(reproduced, command, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(reproduced / "out", out)
    before = (out / "results.csv").read_text()
    for name in ("results.csv", "results.md", "metrics.csv"):
        (out / name).unlink()
    argv = [reproduced / "tiny.yaml", "--seeds", 3, "--epochs_scale", 0.5, "--results_dir", out]
    code, _, err = command(*argv, entry=reproduce_main)
    assert code == 0, err
    assert (out / "results.csv").read_text() == before


def test_folders_of_others_are_left_alone(reproduced, refused, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "results.md").write_text("mine")
    argv = [reproduced / "tiny.yaml", "--results_dir"]
    assert "holds something else" in refused(*argv, tmp_path / "notes", entry=reproduce_main)
    assert "holds something else" in refused(*argv, reproduced / "out", entry=ablation_main)
    assert "is a file" in refused(*argv, tmp_path / "notes" / "results.md", entry=reproduce_main)
    assert (tmp_path / "notes" / "results.md").read_text() == "mine"


def test_a_run_that_has_lost_its_best_epoch_says_so(reproduced, refused, tmp_path):
    shutil.copytree(reproduced / "out", tmp_path / "out")
    (tmp_path / "out" / "seed3" / "stage1" / BEST).unlink()
    argv = [reproduced / "tiny.yaml", "--seeds", 3, "--epochs_scale", 0.5, "--results_dir", tmp_path / "out"]
    assert "remove the folder, to train it anew" in refused(*argv, entry=reproduce_main)


def test_other_settings_do_not_mix_with_a_run_that_is_there(reproduced, refused):
    argv = [reproduced / "tiny.yaml", *SEEDS, "--epochs_scale", 1, "--results_dir", reproduced / "out"]
    assert "epochs: 4 (there 2)" in refused(*argv, entry=reproduce_main)


def test_recipes_that_cannot_be_reproduced(refused, tmp_path, monkeypatch):
    assert "no recipe at" in refused(tmp_path / "none.yaml", entry=reproduce_main)
    for settings, message in (
        ({"model": "resnet20_32w32a"}, "no weights to binarize"),
        ({"model": "resnet21"}, "unknown model 'resnet21'; choose from"),
        ({"freq": 30, "stage2": {"freq": 20}}, "freq 20.0 in stage2 is not stage 1's 30.0"),
        ({"stage2": {"from_scratch": True}}, "not from_scratch"),
        ({"stage2": {"lr": -1}}, "--lr -1.0 is too small"),
    ):
        assert message in refused(write_recipe(tmp_path, **settings), entry=reproduce_main)
    assert not (tmp_path / "results").exists()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "one process" in refused(write_recipe(tmp_path), entry=reproduce_main)
