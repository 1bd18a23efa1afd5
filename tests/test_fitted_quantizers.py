"""A frequency for each layer: --freq_scale."""

import copy
import csv

import pytest
import torch
from conftest import TINY
from recipes import write_recipe

import biper
from biper.commands.arguments import read_options
from biper.commands.export import main as export_main
from biper.commands.quantization_error import main as quantization_error_main
from biper.commands.summary import main as summary_main
from biper.commands.train import build_parser
from biper.errors import UsageError
from biper.experiments import studies
from biper.experiments.recipe import read_recipe
from biper.models.checkpoint import read_checkpoint
from biper.models.methods import method_of
from biper.nn.fitted_quantizers import FittedSine, FittedSquareWave
from biper.nn.layers import binary_layers
from biper.training import trainer as trainers
from biper.training.checkpoint import BEST, LATEST

SCALED = [flag for flag in TINY if flag not in ("--freq", "20")]


def frequencies(network):
    return [layer.weight_quantizer.freq for _, layer in binary_layers(network)]


@pytest.mark.parametrize("name", ["resnet20_1w1a", "vgg_small_1w32a"])
def test_each_layers_frequency_fits_its_fresh_weights(name):
    network = biper.create_model(name, weight_quantizer=FittedSine(2.0))
    for _, layer in binary_layers(network):
        assert layer.weight_quantizer.freq * layer.weight.std().item() == pytest.approx(2.0, rel=1e-5)
    found = frequencies(network)
    assert len(set(found)) == len(found)
    errors = biper.quantization_error(network).layers
    assert [error.freq for error in errors] == found
    assert {round(error.freq_std, 3) for error in errors} == {2.0}
    assert frequencies(copy.deepcopy(network)) == found
    assert frequencies(biper.binarize_(network)) == found


@pytest.mark.parametrize(("fitted", "given"), [(FittedSine, biper.Sine), (FittedSquareWave, biper.SquareWave)])
def test_values_and_gradients_are_those_of_that_frequency(fitted, given):
    w = (0.1 * torch.randn(8, 4, 3, 3)).requires_grad_()
    quantizer = fitted(1.5)
    quantizer.start(w)
    other = given(quantizer.freq)
    results = [q(w) for q in (quantizer, other)]
    gradients = [torch.autograd.grad(result.square().sum() + result.sum(), w)[0] for result in results]
    assert torch.equal(*results)
    assert torch.equal(*gradients)


def test_a_converted_model_takes_the_spread_of_its_own_weights():
    model = torch.nn.Sequential(*(torch.nn.Conv2d(3 if i == 0 else 16, 16, 3) for i in range(3)), torch.nn.Flatten())
    model = biper.convert(model, weight_quantizer=FittedSine(1.0))
    layers = [layer for _, layer in binary_layers(model)]
    assert layers
    for layer in layers:
        assert layer.weight_quantizer.freq == pytest.approx(1 / layer.weight.std().item(), rel=1e-5)


def test_both_stages_and_the_files_keep_the_frequencies(command, monkeypatch, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert command(*SCALED, "--freq_scale", 2, "--epochs", 1, "--results_dir", one)[0] == 0
    first = biper.load_checkpoint(one / BEST)
    assert method_of(first.metadata)["quantizer"] == "biper:freq_scale=2.0"
    flags = ["--load_ckpt_stage1", one / BEST, "--epochs", 2, "-b", 256, "--results_dir"]
    assert command(*flags, two, stage=2)[0] == 0
    second = biper.load_checkpoint(two / BEST)
    assert frequencies(second) == frequencies(first)
    save = trainers.save_checkpoint

    def stopping(contents, path):
        save(contents, path)
        if (contents["epoch"], contents["step"]) == (1, 2):
            raise KeyboardInterrupt("SIGINT")

    monkeypatch.setattr(trainers, "save_checkpoint", stopping)
    assert command(*flags, tmp_path / "cut", "--checkpoint_minutes", 1e-9, stage=2)[0] == 130
    monkeypatch.undo()
    assert command("--results_dir", tmp_path / "cut", "--resume", stage=2)[0] == 0
    whole, cut = (read_checkpoint(folder / LATEST)["state_dict"] for folder in (two, tmp_path / "cut"))
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())
    assert command(two / BEST, "-o", tmp_path / "packed.safetensors", entry=export_main)[0] == 0
    x = torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(biper.load_packed(tmp_path / "packed.safetensors")(x), second(x))
    assert command(two / BEST, "--csv", tmp_path / "qe.csv", entry=quantization_error_main)[0] == 0
    rows = list(csv.DictReader((tmp_path / "qe.csv").read_text().splitlines()))
    assert [float(row["freq"]) for row in rows] == frequencies(second)
    shown = {
        line.split()[0]: line.split()[-1] for line in command(two / BEST, entry=summary_main)[1].splitlines() if line
    }
    found = [shown[name] for name, _ in binary_layers(second)]
    assert found == [f"{freq:.4g}" for freq in frequencies(second)]
    assert "freq" not in command(tmp_path / "packed.safetensors", entry=summary_main)[1]
    assert "freq" not in command("resnet20_1w1a", entry=summary_main)[1]
    code, out, _ = command("-e", tmp_path / "packed.safetensors", family=None)
    assert code == 0
    assert "fitted_square_wave (freq_scale 2.0)" in out


def test_from_scratch_and_in_a_recipe(command, tmp_path):
    flags = [*SCALED, "--from_scratch", "--freq_scale", 1.5, "--epochs", 1, "--results_dir", tmp_path / "run"]
    assert command(*flags, stage=2)[0] == 0
    recipe = read_recipe(_recipe(tmp_path), {})
    assert recipe.stage1["quantizer"] == "biper:freq_scale=1.5"
    for name in ("frequency", "freq_scale", "quantizers"):
        with pytest.raises(UsageError, match="leave quantizer and freq_scale out of the recipe"):
            studies.STUDIES[name](recipe)
    study = studies.freq_scale(read_recipe(write_recipe(tmp_path), {}))
    assert [variant.title for variant in study.variants][:2] == ["freq 20", "freq 0.5 / std(w)"]
    assert study.variants[1].stages[1][1]["quantizer"] == "biper:freq_scale=0.5"


def _recipe(folder):
    path = folder / "scaled.yaml"
    text = "{model: resnet20_1w1a, dataset: digits, image_size: 8, epochs: 1, freq_scale: 1.5}"
    path.write_text(f"stage1: {text}\nstage2: {{epochs: 1}}\n")
    return path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--freq_scale", 2, "--freq", 20], "leave --freq and --quantizer out"),
        (["--freq_scale", 2, "--quantizer", "sign"], "leave --freq and --quantizer out"),
        (["--freq_scale", 0], "--freq_scale 0.0 is too small: above 0"),
        (["--freq_scale", "nan"], "--freq_scale nan is too small"),
        (["--quantizer", "biper:scale=2"], "no setting 'scale'; its settings are freq_scale"),
    ],
)
def test_bad_input(flags, message, refused, tmp_path):
    assert message in refused(*SCALED, *flags, "--results_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_summary_of_a_name_takes_it(command):
    code, out, err = command("resnet20_1w1a", "--quantizer", "biper:freq_scale=2", entry=summary_main)
    assert code == 0, err
    assert "270,522" in out


def test_a_freq_by_flag_wins_over_the_freq_scale_of_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stage1: {model: resnet20_1w1a, freq_scale: 2}")
    given = ["--config", str(recipe)]
    assert read_options(build_parser("cifar10", 1), given, 1)["quantizer"] == "biper:freq_scale=2.0"
    options = read_options(build_parser("cifar10", 1), [*given, "--freq", "10"], 1)
    assert options["freq"] == 10
    assert "quantizer" not in options


def test_the_frequency_that_is_known_is_that_of_the_buffer():
    quantizer = FittedSine(2.0)
    quantizer.start(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)))
    known = quantizer.freq
    quantizer.to("cpu").to(memory_format=torch.channels_last)
    assert quantizer._freq == known  # a step need not ask for it again
    assert quantizer.half().freq == quantizer.frequency.item() != known
