"""Over all quantizers that are registered: two values, the surrogate's gradient, and files that know them."""

import math

import numpy as np
import pytest
import torch

from biper.errors import UsageError
from biper.nn.quantizers import (
    INPUT_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    InputQuantizer,
    PolynomialSign,
    Sign,
    Sine,
    SquareWave,
    WeightQuantizer,
    build_quantizer,
    describe,
    register_quantizer,
    set_progress,
)
from biper.nn.trials import changes_in_place

SETTINGS = {"sine": {"freq": 7.0}, "square_wave": {"freq": 7.0}}
SURROGATES = {  # of the effective value, by latent weight or activation
    "sine": lambda w: torch.sin(7.0 * w),
    "square_wave": lambda w: torch.sin(7.0 * w),
    "sign": lambda w: w.clamp(-1, 1),
    "xnor": lambda w: w.clamp(-1, 1),
    "polynomial_sign": lambda a: (x := a.clamp(-1, 1)) * 2 - x * x.abs(),
    "rsign": lambda a: (x := a.clamp(-1, 1)) * 2 - x * x.abs(),
}
KINDS = [*((name, WEIGHT_QUANTIZERS) for name in WEIGHT_QUANTIZERS), *((n, INPUT_QUANTIZERS) for n in INPUT_QUANTIZERS)]


def made(name, registry):
    """With the parameters of a layer of 4 or 5 channels."""
    quantizer = registry[name](**SETTINGS.get(name, {}))
    quantizer.fit((1, 1, 1))
    if isinstance(quantizer, WeightQuantizer):
        quantizer.start(torch.linspace(-0.2, 0.3, 20))
    return quantizer


@pytest.mark.parametrize(
    ("name", "registry"),
    [(name, registry) for name, registry in KINDS if name in SURROGATES],  # the others: test_comparison_quantizers.py
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_gradient_is_that_of_the_surrogate(name, registry):
    quantizer, x = made(name, registry).eval(), torch.randn(4, 5, 3, 3, dtype=torch.float64).requires_grad_()
    direction = torch.randn_like(x)
    ours = torch.autograd.grad((quantizer(x) * direction).sum(), x)[0]
    torch.testing.assert_close(ours, torch.autograd.grad((SURROGATES[name](x) * direction).sum(), x)[0])


@pytest.mark.parametrize(("name", "registry"), KINDS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_description_makes_an_equal_one(name, registry):
    quantizer = made(name, registry)
    description = describe(quantizer)
    again = build_quantizer(description, registry)
    again.fit((1, 1, 1))
    again.load_state_dict(quantizer.state_dict())
    assert type(again) is type(quantizer)
    assert describe(again) == description == {"name": name, **description}
    x = torch.randn(3, 4, 2, 2)
    assert torch.equal(again(x), quantizer(x))
    assert set(quantizer.state_dict()) <= {"threshold", "frequency"}


@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
def test_signs_are_two_valued_and_a_real_quantizer_has_none_until_it_is_binarized(name):
    quantizer, w = made(name, WEIGHT_QUANTIZERS), torch.cat([torch.randn(50), torch.zeros(1)]).view(3, 17)
    if not quantizer.binary:
        with pytest.raises(UsageError, match="are real"):
            quantizer.signs(w)
    binary = quantizer.binarized()
    assert binary.signs(w).abs().eq(1).all()
    assert torch.equal(binary.signs(w), torch.where(quantizer.real(w) >= 0, 1.0, -1.0))
    assert binary.binarized() is binary


@pytest.mark.parametrize("name", INPUT_QUANTIZERS)
@pytest.mark.parametrize("training", [True, False])
def test_inputs_become_their_signs(name, training):
    a = torch.randn(3, 4, 5, 5)
    a[0, 0, 0, :2] = torch.tensor([0.0, -0.0])
    assert torch.equal(made(name, INPUT_QUANTIZERS).train(training)(a), torch.where(a >= 0, 1.0, -1.0))


def test_without_standardization_the_window_does_not_move():
    a = (5 * torch.randn(2, 3, 4, 4)).requires_grad_()
    grads = [torch.autograd.grad(PolynomialSign(s)(a).sum(), a)[0] for s in (False, True)]
    assert torch.equal(grads[0], (2 - 2 * a.abs()).clamp(min=0))
    assert not torch.allclose(*grads)


@pytest.mark.parametrize("freq", [0.0, -1.0, math.nan, math.inf, "20"])
@pytest.mark.parametrize("kind", [Sine, SquareWave])
def test_a_frequency_is_a_positive_number(kind, freq):
    with pytest.raises(UsageError, match="freq is a positive number"):
        kind(freq)


def test_unknown_names_and_unfit_settings_are_told():
    with pytest.raises(UsageError, match=r"unknown quantizer 'round'; choose from .*sine, square_wave"):
        build_quantizer({"name": "round"}, WEIGHT_QUANTIZERS)
    with pytest.raises(UsageError, match="'sine' has no setting 'frequency'; its settings are freq"):
        build_quantizer({"name": "sine", "frequency": 3.0}, WEIGHT_QUANTIZERS)


def test_one_of_ones_own_is_registered_once_and_described_by_its_attributes(monkeypatch):
    monkeypatch.setattr("biper.nn.quantizers.WEIGHT_QUANTIZERS", dict(WEIGHT_QUANTIZERS))

    class Shifted(WeightQuantizer):
        def __init__(self, shift=0.5):
            super().__init__()
            self.shift = shift

        def forward(self, w):
            return torch.where(w >= self.shift, 1.0, -1.0)

    with pytest.raises(UsageError, match="Shifted is not registered"):
        describe(Shifted())
    assert describe(register_quantizer("shifted")(Shifted)(shift=0.25)) == {"name": "shifted", "shift": 0.25}
    register_quantizer("shifted")(Shifted)  # again, as a notebook's cell does

    class Forgetful(Shifted):
        def __init__(self, shift):
            super().__init__()
            del self.shift

    with pytest.raises(ValueError, match="'shifted' already"):
        register_quantizer("shifted")(Forgetful)
    with pytest.raises(UsageError, match="is not registered"):
        describe(Forgetful(1.0))
    with pytest.raises(UsageError, match="does not keep an argument"):
        describe(register_quantizer("forgetful")(Forgetful)(1.0))
    with pytest.raises(UsageError, match="shift is Tensor, which no file keeps"):
        describe(Shifted(torch.ones(())))


def test_one_class_may_serve_weights_and_inputs():
    assert issubclass(Sign, WeightQuantizer)
    assert issubclass(Sign, InputQuantizer)
    assert WEIGHT_QUANTIZERS["sign"] is INPUT_QUANTIZERS["sign"] is Sign


class Steep(WeightQuantizer):
    """One that changes over training, and keeps that in a place of each kind."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.number, self.numbers, self.part = kind, 0.0, [0.0], torch.nn.Identity()
        self.constants = np.arange(3), math.nan, (torch.ones(2),), torch.nn.functional.relu  # which never change
        self.register_buffer("steepness", torch.zeros(2), persistent=False)

    def set_progress(self, progress):
        if self.kind == "in place":
            self.steepness.fill_(progress)
        elif self.kind == "another buffer":
            self.steepness = torch.full((2,), progress)
        elif self.kind == "a number":
            self.number = progress
        elif self.kind == "a tensor":
            self.tensor = torch.full((2,), progress)
        elif self.kind == "a private number":
            self._number = progress
        elif self.kind == "a list":
            self.numbers[0] = progress
        elif self.kind == "a list of tensors":
            self.numbers[0] = torch.full((2,), progress)
        elif self.kind == "a part":
            self.part.number = progress


PLACES = ("a number", "a private number", "a tensor", "another buffer", "a list", "a list of tensors", "a part")


@pytest.mark.parametrize("kind", ["in place", *PLACES])
def test_what_changes_in_place(kind):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Steep(kind))
    assert changes_in_place(model) is (kind == "in place")
    assert model[1].number == 0.0
    assert not model[1].steepness.any()


@pytest.mark.parametrize(("name", "registry"), KINDS)
def test_what_comes_with_biper_changes_in_place(name, registry):
    assert changes_in_place(registry[name](**SETTINGS.get(name, {})))


def test_progress_reaches_every_quantizer():
    class Told(Sign):
        def set_progress(self, progress):
            self.progress = progress

    model = torch.nn.Sequential(torch.nn.Sequential(Told()), Told())
    set_progress(model, 0.25)
    assert [module.progress for module in model.modules() if isinstance(module, Told)] == [0.25, 0.25]
