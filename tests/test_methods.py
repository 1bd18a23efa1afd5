"""Quantizers of weights and inputs, and the activation, as settings; benchmarks/methods.py runs every combination."""

import math
import re
from unittest.mock import patch

import pytest
import torch
from conftest import TINY, needs_compiler

import biper
from biper.models.checkpoint import read_checkpoint
from biper.models.methods import (
    input_methods,
    input_quantizer_named,
    method_of,
    own_methods,
    require_sound,
    require_sound_inputs,
    weight_quantizer_named,
)
from biper.models.registry import _ARCHITECTURES
from biper.nn.quantizers import INPUT_QUANTIZERS, WEIGHT_QUANTIZERS
from biper.training import trainer as trainers
from biper.training.checkpoint import BEST, LATEST

NAMES = ("--quantizer", "--input_quantizer", "--activation")
METHODS = [  # each of all three at least once
    ("biper", "bireal", "prelu"),
    ("sign", "sign", "hardtanh"),
    ("xnor", "rsign", "prelu"),
    ("irnet", "irnet", "hardtanh"),
    ("recu", "biper", "rprelu"),
]


def flags_of(method):
    return [word for pair in zip(NAMES, method, strict=True) for word in pair]


@needs_compiler
@pytest.mark.parametrize("method", METHODS, ids="-".join)
def test_it_learns_resumes_exactly_and_is_packed(method, command, monkeypatch, tmp_path):
    flags = [*TINY, "--epochs", 3, "--from_scratch", *flags_of(method)]
    code, out, err = command(*flags, "--results_dir", tmp_path / "whole", stage=2)
    assert code == 0, err
    assert "slower" not in out + err  # the fast path knows it
    save = trainers.save_checkpoint

    def stopping(contents, path):
        save(contents, path)
        if (contents["epoch"], contents["step"]) == (1, 3):
            raise KeyboardInterrupt("SIGINT")

    monkeypatch.setattr(trainers, "save_checkpoint", stopping)
    cut = ["--checkpoint_minutes", 1e-9, "--results_dir", tmp_path / "cut"]  # a checkpoint a step
    assert command(*flags, *cut, stage=2)[0] == 130
    monkeypatch.undo()
    assert command("--results_dir", tmp_path / "cut", "--resume", stage=2)[0] == 0
    whole, resumed = (read_checkpoint(tmp_path / name / LATEST) for name in ("whole", "cut"))
    assert whole["history"] == resumed["history"]
    assert all(torch.equal(resumed["state_dict"][name], tensor) for name, tensor in whole["state_dict"].items())
    losses = [row["train_loss"] for row in whole["history"]]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    network = biper.load_checkpoint(tmp_path / "whole" / BEST)
    assert tuple(method_of(network.metadata).values()) == method
    biper.save_packed(biper.pack(network), tmp_path / "packed.safetensors")
    x = torch.randn(5, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(biper.load_packed(tmp_path / "packed.safetensors")(x), network(x))


def test_stage_2_takes_the_method_of_stage_1(command, refused, tmp_path):
    method = ("biper", "rsign", "rprelu")
    assert command(*TINY, "--epochs", 1, *flags_of(method), "--results_dir", tmp_path / "one")[0] == 0
    start = tmp_path / "one" / BEST
    two = ["--load_ckpt_stage1", start, "--epochs", 1, "-b", 256, "--results_dir", tmp_path / "two"]
    assert "--activation prelu contradicts" in refused(*two, "--activation", "prelu", stage=2)
    assert "--quantizer recu contradicts" in refused(*two, "--quantizer", "recu", stage=2)
    assert command(*two, stage=2)[0] == 0
    network = biper.load_checkpoint(tmp_path / "two" / BEST)
    assert tuple(method_of(network.metadata).values()) == method
    assert "which has rsign" in refused("-e", tmp_path / "two" / BEST, "--input_quantizer", "sign", stage=None)
    assert command("-e", tmp_path / "two" / BEST, "--input_quantizer", "rsign", stage=None, family=None)[0] == 0
    other = refused("--results_dir", tmp_path / "two", "--resume", *two[:2], "--quantizer", "xnor", stage=2)
    assert "xnor" in other


def test_architectures_have_their_own_inputs_and_activation():
    for name, family in (("resnet20_react_1w1a", "cifar10"), ("mobilenet_react_1w1a", "imagenet")):
        metadata = biper.create_model(name, family=family).metadata
        assert (metadata.input_quantizer["name"], metadata.activation) == ("rsign", "rprelu")
        assert metadata.to_biper() is None
    assert biper.create_model("resnet20_1w32a").metadata.activation == "relu"
    plain = biper.create_model("resnet20_react_1w1a", input_quantizer=biper.PolynomialSign(), activation="hardtanh")
    names = biper.create_model("resnet20_1w1a").state_dict().keys()
    assert plain.state_dict().keys() == names


@pytest.mark.parametrize("name", [m for m in biper.list_models() if "_react_1w1a" in m])
def test_reactnets_networks_train_and_are_packed(name):
    network = biper.create_model(name, stage=2)
    size = 32 if network.metadata.family == "cifar10" else 64
    x = torch.randn(2, 3, size, size)
    network(x).square().mean().backward()
    learned = [p for n, p in network.named_parameters() if n.endswith(("threshold", "before", "after"))]
    assert learned
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)
    packed, plain = biper.pack(network), network.eval()
    with torch.inference_mode():
        assert torch.equal(packed(x), plain(x))


def test_bad_input(refused):
    fresh = [*TINY, "--from_scratch"]
    assert "one stage: train it by main_stage2.py --from_scratch" in refused(*TINY, "--quantizer", "irnet")
    assert "--quantizer round: choose from biper, irnet, recu" in refused(*fresh, "--quantizer", "round", stage=2)
    assert "--input_quantizer round: choose from biper, bireal" in refused(*TINY, "--input_quantizer", "round")
    assert "--activation tanh: choose from hardtanh, relu" in refused(*TINY, "--activation", "tanh")
    full = ["--dataset", "digits", "-a", "resnet20_32w32a", "--from_scratch", "--quantizer", "xnor"]
    assert "resnet20_32w32a has real weights: leave --quantizer out" in refused(*full, stage=2)
    assert "no setting 'tau'; its settings are tau_min, tau_max" in refused(
        *fresh, "--quantizer", "recu:tau=0.9", stage=2
    )
    said = refused(*fresh, "--quantizer", "recu:tau_min=big", stage=2)
    assert "--quantizer recu: tau_min is a number such as 0.85, not 'big'" in said
    said = refused(*fresh, "--input_quantizer", "irnet:t_max=x", stage=2)
    assert "--input_quantizer irnet: t_max is a number such as 10" in said
    assert "settings are written as in recu" in refused(*fresh, "--quantizer", "recu:0.9", stage=2)
    real = ["--dataset", "digits", "-a", "resnet20_1w32a", "--input_quantizer", "rsign"]
    assert "resnet20_1w32a has real activations" in refused(*real)


def test_names_of_quantizers_are_those_of_methods():
    assert weight_quantizer_named("biper", 20.0).settings() == {"freq": 20.0}
    assert weight_quantizer_named("irnet:t_min=0.001", 20.0).settings() == {"t_min": 0.001, "t_max": 10.0}
    network = biper.create_model("resnet20_1w1a", weight_quantizer=biper.ReCU(tau_max=0.95))
    assert method_of(network.metadata)["quantizer"] == "recu:tau_max=0.95"
    with pytest.raises(biper.errors.UsageError, match="choose from biper, irnet"):
        weight_quantizer_named("square_wave", 20.0)
    assert input_quantizer_named("bireal").settings() == {"standardized": False}


def estimated(x):
    return torch.where(x >= 0, 1.0, -1.0) + (x - x.detach())


class Own(biper.WeightQuantizer):
    def forward(self, w):
        return estimated(w)


class Raises(Own):
    def forward(self, w):
        raise RuntimeError("my own mistake")


class Wide(Own):
    def forward(self, w):
        return super().forward(w).double()


class Zeros(Own):
    def forward(self, w):
        return 0 * w


class NotANumber(Own):
    def forward(self, w):
        return math.nan * w


class Scaled(Own):
    def scale(self, w):
        return w.abs().mean()


class Negative(Own):
    def scale(self, w):
        return -w.abs().mean((1, 2, 3), keepdim=True)


class Flat(Own):
    def forward(self, w):
        return torch.sign(w) * w.detach() / w.detach().abs()  # its gradient is 0 everywhere


class Real(Own):
    binary = False


class Careless(Own):
    def __init__(self):
        self.x = torch.nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Raises, r"RuntimeError: my own mistake \(.*test_methods.py, line \d+\)"),
        (Wide, r"gives \(4, 3, 3, 3\), torch.float64: it has to be of its argument's shape and type"),
        (Zeros, "gives other weights than -1 and \\+1"),
        (NotANumber, "not finite"),
        (Scaled, r"scale\(w\) is \(\): it has to be \(C_out, 1, 1, 1\)"),
        (Negative, "negative values"),
        (Flat, "Flat has no gradient"),
        (Real, r"Real.binary is False, and no binarized\(\)"),
        (Careless, "before Module.__init__"),
    ],
)
def test_a_faulty_quantizer_of_ones_own_is_told_before_anything_is_written(kind, text, refused, tmp_path):
    with patch.dict(WEIGHT_QUANTIZERS):
        biper.register_quantizer("own")(kind)
        flags = [*TINY, "--from_scratch", "--quantizer", "own", "--results_dir", tmp_path / "run"]
        assert re.search(text, refused(*flags, stage=2))
    assert not (tmp_path / "run").exists()


class OwnInput(biper.InputQuantizer):
    def forward(self, a):
        return estimated(a)


class NoForward(biper.InputQuantizer):
    pass


class Shifted(OwnInput):
    def forward(self, a):
        return estimated(a - 0.5)


class Clip(OwnInput):
    def __init__(self, clip=1.0):
        super().__init__()
        self.clip = clip

    def forward(self, a):
        return estimated(a.clamp(-self.clip, self.clip))


class Unused(OwnInput):
    def fit(self, shape):
        self.threshold = torch.nn.Parameter(torch.zeros(shape))


class Everywhere(OwnInput):
    def fit(self, shape):
        self.threshold = torch.nn.Parameter(torch.zeros(2, *shape[:1], 3, 3))


class Ternary(OwnInput):
    def forward(self, a):
        return super().forward(a) * (a.abs() > 0.5)


@pytest.mark.parametrize(
    ("kind", "settings", "text"),
    [
        (NoForward, "", "NotImplementedError"),
        (Shifted, "", r"gives, in evaluation, something else than \+1 from 0 on"),
        (Clip, ":clip=abc", "clip is a number such as 1.0, not .abc."),
        (Clip, ":clap=1", "has no setting 'clap'; its settings are clip"),
        (Everywhere, "", "make it of the shape that fit"),
        (Unused, "", r"something else than \+1 from its threshold on"),
        (Ternary, "", "other values than -1 and \\+1"),
    ],
)
def test_a_faulty_input_quantizer_of_ones_own_is_told_before_anything_is_written(
    kind, settings, text, refused, tmp_path
):
    with patch.dict(INPUT_QUANTIZERS):
        biper.register_quantizer("own")(kind)
        assert re.search(text, refused(*TINY, "--input_quantizer", f"own{settings}", "--results_dir", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@patch.dict(WEIGHT_QUANTIZERS)
def test_what_is_derived_from_bipers_is_a_method_of_its_own():
    kind = type("Own", (biper.SquareWave,), {"__doc__": "A square wave."})
    biper.register_quantizer("own_wave")(kind)
    assert "own_wave" in own_methods()
    assert require_sound("own_wave", 7.0).freq == 7.0
    assert require_sound("own_wave:freq=3", 7.0).freq == 3.0


@pytest.mark.parametrize("name", own_methods())
def test_the_quantizers_that_are_there_are_sound(name):
    require_sound(name, 20.0)


@pytest.mark.parametrize("name", input_methods())
def test_the_input_quantizers_that_are_there_are_sound(name):
    require_sound_inputs(name)


class Narrow(biper.Network):
    def __init__(self, classes, precision):
        super().__init__()
        self.conv, self.fc = precision.conv(3, 8, 3), torch.nn.Linear(9, classes)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


class Pixels(Narrow):
    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda classes, precision: None, "returns NoneType, which has to be derived from biper"),
        (Narrow, "own_1w1a fails on an image of 8x8: RuntimeError: mat1 and mat2"),
        (Pixels, r"own_1w1a gives \(1, 8, 6, 6\) for an image, not logits \(1, 10\)"),
        (lambda classes, precision: precision.none, "own_1w1a cannot be built: AttributeError: .*test_methods.py"),
    ],
)
def test_a_faulty_network_of_ones_own_is_told_in_one_line(build, text, refused, tmp_path):
    with patch.dict(_ARCHITECTURES):
        biper.register_model("cifar10", "own")(build)
        assert re.search(text, refused(*TINY, "-a", "own_1w1a", "--results_dir", tmp_path / "run"))
