"""ablation.py, whole, on 8x8 digits."""

import runpy
import shutil
import statistics
from unittest.mock import patch

import pytest
import torch
import yaml
from conftest import ROOT, THREADS
from recipes import SEEDS, best, checkpoints, interrupted_at, rows, write_recipe

from biper.commands.ablation import main as ablation_main
from biper.errors import TrainingDiverged
from biper.experiments import run as runs
from biper.experiments import studies
from biper.experiments.recipe import read_recipe
from biper.models.checkpoint import read_checkpoint
from biper.models.registry import _ARCHITECTURES
from biper.nn.quantizers import INPUT_QUANTIZERS, WEIGHT_QUANTIZERS
from biper.training.checkpoint import BEST, LATEST
from biper.training.settings import make_settings


def test_a_variant_that_diverges_is_left_out_and_named(ablated, command, tmp_path, monkeypatch):
    shutil.copytree(ablated / "two", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "runs" / "fresh_start" / "seed3")

    def diverging(config):
        raise TrainingDiverged("the loss is nan")

    monkeypatch.setattr(runs, "train", diverging)
    flags = ["--epochs", 1, 1, "--results_dir", tmp_path / "two", *SEEDS, "--studies", "warm_start"]
    code, _, err = command(ablated / "tiny.yaml", *flags, entry=ablation_main)
    assert code == 1
    assert "warm_start: fresh start, seed 3" in err
    table = {(r["variant"], r["stage"], r["quantity"]): r for r in rows(tmp_path / "two" / "warm_start.csv")}
    assert (table["fresh start", "2", "QE"]["n"], table["fresh start", "2", "QE"]["seed_3"]) == ("1", "")
    assert table["warm start", "2", "QE"]["n"] == "2"


@pytest.mark.parametrize("own", ["sin2", "off", "cos2"])
def test_the_regularizer_study_has_the_three_it_names_whatever_the_recipe_has(tmp_path, own):
    settings = {"regularizer": own != "off"} | ({} if own == "off" else {"regularizer_form": own})
    study = studies.regularizer(read_recipe(write_recipe(tmp_path, settings, **settings), {}))
    kinds = []
    for variant in study.variants:
        one = make_settings("cifar10", 1, variant.stages[1][1])
        kinds.append(one.regularizer_form if one.regularizer else "off")
    assert kinds == ["sin2", "off", "cos2"]
    assert [variant.stages[1][0] == "freq_20" for variant in study.variants] == [k == own for k in kinds]


@pytest.mark.parametrize(
    ("own", "name", "base", "titles"),
    [
        ({}, "input_quantizers", "biper", ["biper", "bireal", "irnet", "rsign", "sign"]),
        ({"input_quantizer": "sign"}, "input_quantizers", "sign", ["biper", "bireal", "irnet", "rsign", "sign"]),
        ({"model": "resnet20_react_1w1a"}, "activations", "rprelu", ["hardtanh", "prelu", "rprelu"]),
        ({"model": "resnet20_1w32a"}, "activations", "relu", ["hardtanh", "prelu", "rprelu", "relu"]),
    ],
)
def test_the_other_half_of_a_method_is_varied_in_stage_1_from_which_stage_2_takes_it(tmp_path, own, name, base, titles):
    setting = name.removesuffix("s")
    study = studies.STUDIES[name](read_recipe(write_recipe(tmp_path, own, **own), {}))
    assert [variant.title for variant in study.variants] == titles
    assert study.base == base
    for variant in study.variants:
        assert variant.stages[1][1].get(setting, base) == variant.title
        assert setting not in variant.stages[2][1]
        assert (variant.stages[1][0] == "freq_20") == (variant.title == base)


@patch.dict(WEIGHT_QUANTIZERS)
@patch.dict(INPUT_QUANTIZERS)
@patch.dict(_ARCHITECTURES)
def test_the_class_of_a_second_stage_is_no_rival(tmp_path):
    runpy.run_path(str(ROOT / "examples" / "own_method.py"))
    study = studies.quantizers(read_recipe(write_recipe(tmp_path), {}))
    stages = {variant.title: sorted(variant.stages) for variant in study.variants}
    assert "soft_sign" not in stages
    assert (stages["soft"], stages["sign"], stages["biper"]) == ([1, 2], [2], [1, 2])


def test_a_table_keeps_the_variants_that_nothing_registers_now(refused, tmp_path):
    path, out = write_recipe(tmp_path), tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    (out / "warm_start.csv").write_text("variant,stage\nmine,2\nwarm start,2\n")
    text = refused(path, "--studies", "warm_start", "--results_dir", out, entry=ablation_main)
    assert "warm_start.csv has mine, which nothing registers or names now: --import the file" in text


def test_bad_input_of_ablation(refused, tmp_path):
    path = write_recipe(tmp_path)
    assert "at least 1 each" in refused(path, "--epochs", 0, 1, entry=ablation_main)
    assert "invalid choice: 'colour'" in refused(path, "--studies", "colour", entry=ablation_main)
    assert "are those of one study" in refused(path, "--variants", "sign", entry=ablation_main)
    text = refused(path, "--studies", "quantizers", "--variants", "sing", "recu", entry=ablation_main)
    assert "no variant is called 'sing'; there are biper, biper, one stage, irnet, recu, sign" in text


def test_the_variants_of_a_study_can_be_named(tmp_path):
    study = studies.quantizers(read_recipe(write_recipe(tmp_path), {})).only(["recu", "sign"])
    assert [variant.title for variant in study.variants] == ["biper", "recu", "sign"]
    assert study.base == "biper"


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """Every study with one seed, of 1 + 1 epochs; then one of them with two."""
    torch.set_num_threads(THREADS)
    patch = pytest.MonkeyPatch()
    patch.setattr(studies, "FREQUENCIES", (5.0, 40.0))  # of five, to save time
    folder = tmp_path_factory.mktemp("ablated")
    recipe = write_recipe(folder, {"validation": 1000}, validation=1000)  # few training images, to save time
    argv = [recipe, "--epochs", 1, 1, "--results_dir", folder / "out"]
    ablation_main([str(a) for a in argv])
    for run in ("freq_20", "fresh_start"):  # of the first seed, which is there already
        shutil.copytree(folder / "out" / "runs" / run, folder / "two" / "runs" / run)
    argv = [recipe, "--epochs", 1, 1, "--results_dir", folder / "two", *SEEDS, "--studies", "warm_start"]
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
        assert "| stage 1: top-1 (%) | stage 2: top-1 (%) | difference |" in text
        assert "| stage 1: QE | stage 2: QE |" in text
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_variants_differ_in_what_they_are_named_after(ablated):
    folder = ablated / "out" / "runs"

    def settings(key, stage):
        return yaml.safe_load((folder / key / "seed0" / f"stage{stage}" / "config.yaml").read_text())[f"stage{stage}"]

    assert [settings(f"freq_{freq}", 2)["freq"] for freq in (5, 40)] == [5.0, 40.0]
    start = settings("binary_from_start", 2)
    assert (start["epochs"], start["lr"], start["from_scratch"], start["tau_max"]) == (2, 0.05, True, 0.03)
    assert start["warm_up"] is False  # as in the one epoch of stage 1
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


def test_no_table_loses_a_seed(ablated, command, tmp_path):
    """Not with fewer seeds, and not when a call with all of them is stopped early."""
    out = tmp_path / "two"
    shutil.copytree(ablated / "two", out)
    before = (out / "warm_start.csv").read_text()
    (out / "warm_start.csv").unlink()
    flags = ["--epochs", 1, 1, "--results_dir", out, "--studies", "warm_start", "--seeds", 3]
    code, _, err = command(ablated / "tiny.yaml", *flags, entry=ablation_main)
    assert code == 0, err
    assert (out / "warm_start.csv").read_text() == before
    with interrupted_at("warm_start.md"):
        code, _, err = command(ablated / "tiny.yaml", *flags, 0, entry=ablation_main)  # in the first seed of two
    assert code == 130
    assert (out / "warm_start.csv").read_text() == before


def test_runs_are_shared_and_not_repeated(ablated, command):
    before = checkpoints(ablated / "out")
    argv = [ablated / "tiny.yaml", "--epochs", 1, 1, "--results_dir", ablated / "out"]
    code, out, err = command(*argv, entry=ablation_main)
    assert code == 0, err
    assert f"resnet20_1w1a on scikit-learn's digits: 1 + 1 epochs, seeds 0, results in {ablated / 'out'}" in out
    assert checkpoints(ablated / "out") == before
    stages1 = [path for path in before if (path.parent.name, path.name) == ("stage1", LATEST)]
    assert len(stages1) == 3 + 2 + 2  # frequencies, the regularizer's other forms, stage 1's other learning rates


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
    assert "needs --model and --freq" in refused("--from_scratch", "--dataset", "digits", stage=2)
    full = ["-a", "resnet20_32w32a", "--freq", 20, "--from_scratch", "--dataset", "digits"]
    assert "no weights to binarize" in refused(*full, stage=2)
    both = ["--from_scratch", "--load_ckpt_stage1", tmp_path / "1" / BEST]
    assert "leave --load_ckpt_stage1 out" in refused(*flags, *both, stage=2)
