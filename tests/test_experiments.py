"""reproduce.py and ablation.py, whole, on 8x8 digits."""

import csv
import json
import shutil
import statistics
import sys

import pytest
import torch
import yaml
from conftest import ROOT

from biper.checkpoint import BEST, LATEST, read_checkpoint
from biper.cli import ablation_main, reproduce_main
from biper.experiments import runs, studies
from biper.experiments.recipe import read_recipe, shortened
from biper.schedule import lr_at
from biper.stage import Stage

RECIPE = {
    "stage1": {"model": "resnet20_1w1a", "dataset": "digits", "image_size": 8, "epochs": 4, "batch_size": 256},
    "stage2": {"dataset": "digits", "image_size": 8, "epochs": 2, "batch_size": 256, "lr": 0.01, "tau": 0.02},
}
RECIPE["stage1"] |= {"lr": 0.05, "freq": 20, "warm_up": True, "warm_up_epochs": 4, "tau": 0.03}
SEEDS = ["--seeds", 0, 3]


def write_recipe(folder, **stage1):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "stage1": RECIPE["stage1"] | stage1}))
    return path


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def best(metrics, **labels):
    """The best test top-1 of the rows of metrics.csv that have these labels."""
    return max(float(row["test_top1"]) for row in metrics if all(row[k] == str(v) for k, v in labels.items()))


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """Two seeds of the recipe at half its length: 2 + 1 epochs."""
    torch.set_num_threads(2)  # as in the tests that go on with it
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


def test_the_released_checkpoint_is_small_and_names_no_paths(reproduced):
    path = reproduced / "out" / "seed0" / "release" / "model.pth.tar"
    contents = read_checkpoint(path)
    assert "optimizer" not in contents
    assert str(reproduced) not in str(contents["settings"])
    assert str(reproduced) not in path.with_name("README.md").read_text()
    assert path.stat().st_size < 1_200_000
    whole = read_checkpoint(reproduced / "out" / "seed0" / "stage2" / BEST)["state_dict"]
    assert all(torch.equal(tensor, contents["state_dict"][name]) for name, tensor in whole.items())


def test_what_is_there_is_not_run_again(reproduced, command, tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    shutil.copytree(reproduced / "out", moved)
    table = (moved / "results.csv").read_text()
    monkeypatch.setattr(runs, "train", lambda *_: pytest.fail("trained again"))
    argv = [reproduced / "tiny.yaml", *SEEDS, "--epochs_scale", 0.5, "--results_dir", moved]
    code, out, err = command(*argv, entry=reproduce_main)
    assert code == 0, err
    assert out.count("is there already") == 4
    assert (moved / "results.csv").read_text() == table


@pytest.mark.parametrize("after", [1, 2])
def test_interrupted_and_taken_up_again(reproduced, command, tmp_path, monkeypatch, after):
    """After the first epoch, and after stage 1: the second seed's run ends as the uninterrupted one did."""
    argv = [reproduced / "tiny.yaml", "--seeds", 3, "--epochs_scale", 0.5, "--results_dir", tmp_path]
    epochs = []
    whole = Stage.run_epoch

    def interrupted(stage):
        if len(epochs) == after:
            raise KeyboardInterrupt("SIGINT")
        epochs.append(stage.epoch)
        whole(stage)

    monkeypatch.setattr(Stage, "run_epoch", interrupted)
    code, _, err = command(*argv, entry=reproduce_main)
    assert code == 130
    assert "the same command goes on from there" in err
    monkeypatch.setattr(Stage, "run_epoch", whole)
    assert command(*argv, entry=reproduce_main)[0] == 0
    for stage in (1, 2):
        one, two = (folder / f"seed3/stage{stage}/metrics.csv" for folder in (tmp_path, reproduced / "out"))
        assert one.read_text() == two.read_text()


def test_other_settings_do_not_mix_with_a_run_that_is_there(reproduced, refused):
    argv = [reproduced / "tiny.yaml", *SEEDS, "--epochs_scale", 1, "--results_dir", reproduced / "out"]
    assert "epochs: 4 (there 2)" in refused(*argv, entry=reproduce_main)


def test_schedules_are_shortened_in_proportion(tmp_path):
    path = write_recipe(tmp_path, epochs=200, warm_up_epochs=10, lr_type="step", lr_decay_step=[100, 150])
    recipe = shortened(read_recipe(path, {}), (20, 2))
    one, two = recipe.stage1, recipe.stage2
    assert (one["epochs"], one["lr_decay_step"], one["warm_up"]) == (20, (10, 15), False)  # one epoch raises nothing
    assert two == read_recipe(path, {}).stage2
    one = shortened(read_recipe(path, {}), (100, 2)).stage1
    assert (one["warm_up"], one["warm_up_epochs"]) == (True, 5)
    assert lr_at(4, lr=1.0, epochs=100, warm_up=True, warm_up_epochs=one["warm_up_epochs"]) == 1.0


def test_shipped_recipes_shortened_reach_a_small_rate():
    for path in (ROOT / "cifar10" / "configs").glob("*.yaml"):
        recipe = read_recipe(path, {})
        if path.stem == "quickstart":  # of which one epoch is left
            continue
        short = shortened(recipe, tuple(max(1, round(0.02 * epochs)) for epochs in recipe.epochs)).stage1
        names = ("lr", "epochs", "warm_up", "warm_up_epochs")
        settings = {name: short[name] for name in names if name in short}
        rates = [lr_at(epoch, **settings) for epoch in range(short["epochs"])]
        assert max(rates) == short["lr"]
        assert rates[-1] <= short["lr"] * 0.6


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "1", "1"], "each once"),
        (["--seeds", "-1"], "from 0 up"),
        (["--epochs_scale", "0"], "above 0, at most 1"),
        (["--epochs_scale", "nan"], "above 0, at most 1"),
        (["--lr", "1"], "unrecognized arguments"),
        (["--dataset", "folder", "--data_path", "nowhere"], "--data_path is not a folder"),
    ],
)
def test_bad_input_of_reproduce(refused, tmp_path, argv, message):
    out = tmp_path / "out"
    assert message in refused(write_recipe(tmp_path), "--results_dir", out, *argv, entry=reproduce_main)
    assert not out.exists()


def test_recipes_that_cannot_be_reproduced(refused, tmp_path, monkeypatch):
    assert "cannot read" in refused(tmp_path / "none.yaml", entry=reproduce_main)
    full = write_recipe(tmp_path, model="resnet20_32w32a")
    assert "no weights to binarize" in refused(full, entry=reproduce_main)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "one process" in refused(write_recipe(tmp_path), entry=reproduce_main)


def test_bad_input_of_ablation(refused, tmp_path):
    path = write_recipe(tmp_path)
    assert "at least 1 each" in refused(path, "--epochs", 0, 1, entry=ablation_main)
    assert "invalid choice: 'colour'" in refused(path, "--studies", "colour", entry=ablation_main)


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """Every study with one seed, of 1 + 1 epochs; then one of them with two."""
    torch.set_num_threads(2)
    patch = pytest.MonkeyPatch()
    patch.setattr(studies, "FREQUENCIES", (5.0, 40.0))  # of five, to save time
    folder = tmp_path_factory.mktemp("ablated")
    argv = [write_recipe(folder), "--epochs", 1, 1, "--results_dir", folder / "out"]
    ablation_main([str(a) for a in argv])
    argv = [write_recipe(folder), "--epochs", 1, 1, "--results_dir", folder / "two", *SEEDS, "--studies", "warm_start"]
    ablation_main([str(a) for a in argv])
    yield folder
    patch.undo()


def test_every_study_has_its_table_and_picture(ablated):
    out = ablated / "out"
    for name, variants in {
        "frequency": ["freq 5", "freq 20", "freq 40"],
        "two_stages": ["two stages", "binary from the start"],
        "warm_start": ["warm start", "fresh start"],
        "regularizer": ["sin², published", "off", "cos², opposite"],
        "learning_rate": ["0.05, 0.01", "0.025, 0.01", "0.1, 0.01", "0.05, 0.002", "0.05, 0.05"],
    }.items():
        assert list(dict.fromkeys(row["variant"] for row in rows(out / f"{name}.csv"))) == variants
        text = (out / f"{name}.md").read_text()
        assert all(f"| {variant} |" in text for variant in variants)
        assert "python ablation.py tiny.yaml --seeds 0 --epochs 1 1\n" in text
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_variants_differ_in_what_they_are_named_after(ablated):
    folder = ablated / "out" / "runs"

    def settings(key, stage):
        return yaml.safe_load((folder / key / "seed0" / f"stage{stage}" / "config.yaml").read_text())[f"stage{stage}"]

    assert [settings(f"freq_{freq}", 2)["freq"] for freq in (5, 40)] == [5.0, 40.0]
    start = settings("binary_from_start", 2)
    assert (start["epochs"], start["lr"], start["from_scratch"], start["tau_max"]) == (2, 0.05, True, 0.03)
    fresh = settings("fresh_start", 2)
    assert (fresh["epochs"], fresh["lr"], fresh["from_scratch"]) == (1, 0.01, True)
    assert [settings("regularizer_off", stage)["regularizer"] for stage in (1, 2)] == [False, False]
    assert [settings("regularizer_cos2", stage)["regularizer_form"] for stage in (1, 2)] == ["cos2", "cos2"]
    assert str(folder / "freq_20") in settings("stage2_lr_0.05", 2)["load_ckpt_stage1"]
    assert not (folder / "fresh_start" / "seed0" / "stage1").exists()


def test_the_ablation_tables_are_made_of_the_logs(ablated):
    metrics, layers = rows(ablated / "two" / "metrics.csv"), rows(ablated / "two" / "layers.csv")
    table = {(r["variant"], r["stage"], r["quantity"]): r for r in rows(ablated / "two" / "warm_start.csv")}
    means = {}
    for title, key in {"warm start": "freq_20", "fresh start": "fresh_start"}.items():
        values = [best(metrics, run=key, seed=seed, stage=2) for seed in (0, 3)]
        row = table[title, "2", "top-1 (%)"]
        assert [float(row["seed_0"]), float(row["seed_3"])] == values
        assert (float(row["mean"]), row["n"]) == (pytest.approx(statistics.fmean(values)), "2")
        means[title] = values
        own = [r for r in layers if (r["run"], r["seed"], r["stage"]) == (key, "3", "2")]
        assert len(own) == 18
        assert float(table[title, "2", "QE"]["seed_3"]) == pytest.approx(sum(float(r["l1"]) for r in own))
    gaps = [b - a for a, b in zip(means["warm start"], means["fresh start"], strict=True)]
    shown = f"{'+' if statistics.fmean(gaps) > 0 else ''}{statistics.fmean(gaps):.2f} ± {statistics.stdev(gaps):.2f}"
    assert f"| {shown} |" in (ablated / "two" / "warm_start.md").read_text()


def test_runs_are_shared_and_not_repeated(ablated, command, monkeypatch):
    monkeypatch.setattr(runs, "train", lambda *_: pytest.fail("trained again"))
    argv = [ablated / "tiny.yaml", "--epochs", 1, 1, "--results_dir", ablated / "out"]
    code, out, err = command(*argv, entry=ablation_main)
    assert code == 0, err
    assert out.count("stage1 is there already") == 3 + 1 + 1 + 3 + 5  # by study


def test_fresh_stage_2_starts_from_stage_1s_first_weights(command, refused, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("stage2: {load_ckpt_stage1: nowhere.pth.tar}\n")
    flags = ["--dataset", "digits", "--image_size", 8, "-b", 256, "-a", "resnet20_1w1a", "--freq", 20]
    frozen = [*flags, "--epochs", 1, "--lr", 1e-30, "--weight_decay", 0, "--no-regularizer", "--seed", 4]
    fresh = [*frozen, "--from_scratch", "--config", config, "--results_dir", tmp_path / "2"]
    code, out, err = command(*fresh, stage=2)
    assert code == 0, err
    assert "starting from fresh weights" in out
    assert command(*frozen, "--results_dir", tmp_path / "1")[0] == 0
    one, two = (read_checkpoint(tmp_path / stage / LATEST)["state_dict"]["conv1.weight"] for stage in "12")
    assert torch.equal(one, two)
    assert "always starts fresh" in refused(*flags, "--from_scratch")
    both = ["--from_scratch", "--load_ckpt_stage1", tmp_path / "1" / BEST]
    assert "leave --load_ckpt_stage1 out" in refused(*flags, *both, stage=2)


def test_the_commands_help_without_torch(shell):
    for script in ("reproduce.py", "ablation.py"):
        result = shell(sys.executable, "-X", "importtime", script, "--help")
        assert result.returncode == 0
        assert "RECIPE.yaml" in result.stdout
        assert "torch" not in {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
