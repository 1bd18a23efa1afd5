"""Settings: defaults, flags, YAML."""

from dataclasses import replace
from pathlib import Path

import pytest

from biper.commands.arguments import read_options
from biper.commands.train import build_parser
from biper.errors import UsageError
from biper.models import list_models
from biper.training.settings import (
    SETTINGS,
    Settings,
    convert,
    differences,
    expand_shorthands,
    make_settings,
    read_yaml,
)

CONFIGS = sorted(Path(__file__).parents[1].glob("*/configs/*.yaml"))


def options(*argv, stage=1, family="cifar10"):
    return read_options(build_parser(family, stage), argv, stage)


def test_defaults_are_the_published_ones():
    c = Settings("cifar10", 1)
    assert (c.lr, c.weight_decay, c.epochs, c.batch_size, c.batch_size_test) == (0.1, 5e-4, 600, 256, 128)
    assert (c.freq, c.tau_min, c.tau_max, c.momentum, c.regularizer) == (30, 0.001, 0.001, 0.9, True)


def test_every_published_flag_is_there():
    argv = """--results_dir r --save s --resume -e f --evaluate f --seed 1 --model m -a m --dataset cifar10
    --data_path d --type torch.FloatTensor --gpus 0,1 --lr 1 --weight_decay 1 --momentum 0.5 --workers 2 --epochs 9
    --start_epoch 1 -b 8 --batch_size 8 -bt 8 --batch_size_test 8 --print_freq 5 -p 5 --time_estimate 0 --lr_type cos
    --lr_decay_step 1 2 --optimizer adam --warm_up --tau_min 1 --tau_max 2 --freq 20 --load_ckpt_stage1 f --use_dali"""
    given = options(*argv.split())
    assert given["lr_decay_step"] == (1, 2)
    assert given["warm_up"] is True
    assert options("--tau", "0.5") == {"tau_min": 0.5, "tau_max": 0.5}
    assert set(given) <= set(SETTINGS)
    Settings("cifar10", 1, **given)


def test_flags_win_over_yaml(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "stage1: {lr: 1e-2, tau: 1, gpus: 1, lr_decay_step: [3], image_size: 8, warm_up: true}\nstage2: {}\n"
    )
    given = options("--config", str(file), "--lr", "0.5", "--tau_max", "2", "--no-warm_up")
    assert given == {
        "lr": 0.5,
        "tau_min": 1.0,
        "tau_max": 2.0,
        "gpus": "1",
        "lr_decay_step": (3,),
        "image_size": 8,
        "warm_up": False,
    }
    assert options("--config", str(file), stage=2) == {}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("stage", [1, 2])
def test_shipped_configs(path, stage):
    family = path.parts[-3]
    config = make_settings(family, stage, read_yaml(path, stage))
    assert config.warm_up == (stage == 1 or family == "cifar10")
    assert config.regularizer == (family == "cifar10")
    assert config.model in list_models(family)
    assert (stage == 1) == (config.freq == 20)


def test_published_recipe_is_what_run_stage1_trains():
    c = Settings("cifar10", 1, **read_yaml(CONFIGS[0].with_name("resnet18.yaml"), 1))
    assert (c.epochs, c.lr, c.weight_decay, c.batch_size, c.tau_min, c.freq) == (600, 0.021, 0.0016, 256, 0.037, 20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage1: {lrr: 1}", "unknown key 'lrr'"),
        ("stage1: {lr: fast}", "lr: expected float, not 'fast'"),
        ("stage1: {epochs: 1.5}", "epochs: expected int"),
        ("stage1: {epochs: true}", "epochs: expected int"),
        ("stage1: {warm_up: 1}", "warm_up: expected bool"),
        ("stage1: {lr: 1" + 400 * "0" + "}", "lr: expected float"),
        ("stage1: {lr_decay_step: [a]}", "lr_decay_step: expected int"),
        ("stage1: {model: [a]}", "model: expected str"),
        ("stage1: {tau: 1, tau_min: 2}", "--tau sets both"),
        ("stage2: {lr: 1}", "no settings for stage 1"),
        ("stage1: 3", "no settings for stage 1"),
        ("lr: 1", "expected the sections"),
        ("- 1", "expected the sections"),
        ("stage1: {lr: [}", "no valid YAML"),
        ("\x00", "no valid YAML"),
    ],
)
def test_wrong_yaml(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_yaml(file, 1)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_yaml(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        read_yaml(tmp_path / "none.yaml", 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"batch_size": 1},
        {"batch_size_test": 0},
        {"epochs": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"freq": 0.0},
        {"freq": -20.0},
        {"tau_min": -1.0},
        {"workers": -1},
        {"seed": -1},
        {"seed": 2**64},
        {"image_size": 4},
        {"dataset": "mnist"},
        {"lr_type": "exp"},
        {"lr_type": "step"},
        {"start_epoch": 600},
        {"time_estimate": 2},
    ],
)
def test_values_out_of_range(wrong):
    with pytest.raises(UsageError, match="--"):
        Settings("cifar10", 1, **wrong)


@pytest.mark.parametrize("argv", [["--lr", "fast"], ["--no-such-flag"], ["--dataset", "mnist"], ["--res", "x"], ["x"]])
def test_wrong_flags(argv):
    with pytest.raises(UsageError, match=r"\(see .* --help\)"):
        options(*argv)


def test_tau_and_its_ends_exclude_each_other():
    with pytest.raises(UsageError, match="sets both"):
        expand_shorthands({"tau": 1.0, "tau_max": 2.0})


def test_convert_accepts_what_yaml_makes_of_numbers():
    assert convert("lr", "1e-4") == 1e-4
    assert convert("lr", 1) == 1.0
    assert convert("image_size", None) is None
    assert convert("lr_decay_step", 5) == (5,)


def test_differences_ignore_where_and_on_what_a_run_runs():
    config = Settings("cifar10", 1)
    other = replace(config, device="cpu", workers=1, data_path="x", print_freq=1)
    settings = {name: getattr(config, name) for name in SETTINGS}
    assert differences(other, settings) == []
    assert differences(replace(config, lr=0.2), settings) == ["lr: 0.2 (there 0.1)"]


def test_help_is_grouped_and_complete():
    text = build_parser("imagenet", 1).format_help()
    for group in ("run:", "network:", "data:", "training:", "hardware:"):
        assert group in text
    assert all(f"--{name}" in text for name in (*SETTINGS, "config", "tau"))
    assert "(default 0.85)" in text


def test_imagenet_has_its_published_defaults():
    c = make_settings("imagenet", 1, {"epochs": 3})
    assert (c.epochs, c.lr, c.weight_decay, c.batch_size, c.batch_size_test) == (3, 0.1, 1e-4, 512, 256)
    assert (c.freq, c.tau_min, c.tau_max, c.regularizer, c.dataset) == (30, 0.85, 0.99, False, "imagenet")
    assert make_settings("imagenet", 1, {"regularizer": True}).regularizer


def test_the_published_imagenet_commands_are_understood():
    flags = "--gpus 0,1,2,3 --model resnet18_1w1a --data_path data --dataset imagenet --epochs 200 --lr 0.1"
    flags += " --weight_decay 1e-4 -b 512 -bt 256 --lr_type cos --freq 20 --warm_up --tau_min 0.85 --tau_max 0.99"
    given = options(*f"{flags} --print_freq 250 --use_dali".split(), family="imagenet")
    assert make_settings("imagenet", 1, given).use_dali
    recipe = options("--config", str(CONFIGS[-2]), family="imagenet")
    assert CONFIGS[-2].parts[-3:] == ("imagenet", "configs", "resnet18.yaml")
    same = [name for name in recipe if name in given and recipe[name] == given[name]]
    assert set(same) >= {"epochs", "lr", "weight_decay", "batch_size", "batch_size_test", "freq", "warm_up", "tau_min"}
