"""The CPU kernels against the plain operations that they stand for."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_compiler
from torch import nn

from biper.cpu import functions as kernels
from biper.cpu.functions import Activation, ActivationKind, Estimator, Surrogate
from biper.nn.functional import (
    binary_sign,
    error_decay_sign,
    standardized_sign,
    straight_through_sign,
    threshold_sign,
)

pytestmark = needs_compiler
HARDTANH = Activation(ActivationKind.HARDTANH)
POLYNOMIAL, CLIPPED, DECAY = Surrogate.POLYNOMIAL, Surrogate.CLIPPED, Surrogate.DECAY
SIGNS = {  # a kind of signs, and torch's own of activations and thresholds
    "standardized": (kernels.STANDARDIZED, lambda a, _: standardized_sign(a)),
    "polynomial": (Estimator(POLYNOMIAL), lambda a, _: binary_sign(a)),
    "clipped": (Estimator(CLIPPED), lambda a, _: straight_through_sign(a)),
    "decay": (Estimator(DECAY, t=3.0), lambda a, _: error_decay_sign(a, torch.tensor(3.0))),
    "thresholds": (Estimator(POLYNOMIAL), threshold_sign),
}


def channels_last(*shape):
    return torch.randn(*shape).to(memory_format=torch.channels_last).requires_grad_()


def plain_unit(u, alpha, norm, skip, clamp):
    out = norm(u.float() if alpha is None else u.float() * alpha)
    out = out if skip is None else out + skip
    return F.hardtanh(out) if clamp else out


def fresh_norm():
    norm = nn.BatchNorm2d(32)
    with torch.no_grad():
        norm.weight.uniform_(-1, 2)
        norm.bias.uniform_(-1, 1)
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    return norm


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("skipped", [True, False])
@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("shape", [(3, 32, 5, 7), (2, 32, 9, 9)])
def test_unit(scaled, skipped, clamp, shape):
    torch.manual_seed(0)
    u = (4 * channels_last(*shape) + 1).detach().requires_grad_()
    alpha = torch.randn(32, 1, 1, requires_grad=True) if scaled else None
    skip = channels_last(*shape) if skipped else None
    norm, other = fresh_norm(), fresh_norm()
    other.load_state_dict(norm.state_dict())
    a, s = kernels.unit(
        u, alpha, norm, skip, activation=HARDTANH if clamp else Activation(), signs=torch.float32, activations=True
    )
    expected = plain_unit(u, alpha, other, skip, clamp)
    torch.testing.assert_close(a, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(s, torch.where(a >= 0, 1.0, -1.0))
    values = u if alpha is None else u * alpha
    rounding = values[:, 0].numel() * 2**-23  # two sums of so many values, in whatever order
    atol = norm.momentum * rounding * values.abs().max().item()
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(buffer, other.get_buffer(name), atol=atol, rtol=rounding)
    to_signs, to_activations = torch.randn(*shape), torch.randn(*shape)
    leaves = [t for t in (u, skip) if t is not None]
    ours = torch.autograd.grad((s * to_signs + a * to_activations).sum(), [*leaves, norm.weight, norm.bias])
    loss = (standardized_sign(expected) * to_signs + expected * to_activations).sum()
    for one, two in zip(ours, torch.autograd.grad(loss, [*leaves, other.weight, other.bias]), strict=True):
        torch.testing.assert_close(one, two, atol=2e-4, rtol=2e-4)


def parameters_of(activation, channels=32):
    """Slopes, and the shifts before and after, as far as a PReLU has them."""
    count = {"hardtanh": 0, "prelu": 1, "rprelu": 3}[activation]
    shapes = [(channels,), (channels, 1, 1), (channels, 1, 1)][:count]
    return [(0.3 * torch.randn(shape)).requires_grad_() for shape in shapes]


def activated(z, slope=None, before=0, after=0):
    return F.hardtanh(z) if slope is None else F.prelu(z - before, slope) + after


def ours_of(signs, u, skip, norm, parameters, threshold, dtype=torch.float32, activations=True):
    kind = Activation(ActivationKind.PRELU, *parameters) if parameters else HARDTANH
    estimator = SIGNS[signs][0]._replace(threshold=threshold if signs == "thresholds" else None)
    how = {"signs": dtype, "activations": activations}
    return kernels.unit(u, None, norm, skip, activation=kind, estimator=estimator, **how)


@pytest.mark.parametrize("skipped", [True, False])
@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("activation", ["hardtanh", "prelu", "rprelu"])
def test_unit_of_every_activation_and_every_sign(activation, signs, skipped):
    torch.manual_seed(0)
    shape = 3, 32, 9, 8
    u, skip = channels_last(*shape), channels_last(*shape) if skipped else None
    parameters, threshold = parameters_of(activation), (0.3 * torch.randn(32, 1, 1)).requires_grad_()
    norm, other = fresh_norm(), fresh_norm()
    other.load_state_dict(norm.state_dict())
    a, s = ours_of(signs, u, skip, norm, parameters, threshold)
    expected = activated(other(u) if skip is None else other(u) + skip, *parameters)
    torch.testing.assert_close(a, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(s, torch.where(a >= (threshold if signs == "thresholds" else 0), 1.0, -1.0))
    directions = torch.randn(2, *shape)
    leaves = [u, *([skip] if skipped else []), *parameters, *([threshold] if signs == "thresholds" else [])]
    losses = [
        (x * directions[0] + y * directions[1]).sum()
        for x, y in ((s, a), (SIGNS[signs][1](expected, threshold), expected))
    ]
    ours = torch.autograd.grad(losses[0], [*leaves, norm.weight, norm.bias])
    theirs = torch.autograd.grad(losses[1], [*leaves, other.weight, other.bias])
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("activation", ["hardtanh", "prelu", "rprelu"])
def test_every_unit_in_bfloat16_without_activations_is_near_float32s(activation, signs):
    torch.manual_seed(0)
    u = (2 * torch.randint(-40, 40, (3, 32, 6, 6))).to(torch.bfloat16).to(memory_format=torch.channels_last)
    parameters, threshold = parameters_of(activation), (0.3 * torch.randn(32, 1, 1)).requires_grad_()
    direction, results = torch.randn(3, 32, 6, 6), []
    for x in (u.requires_grad_(), u.detach().float().requires_grad_()):
        torch.manual_seed(1)
        a, s = ours_of(signs, x, None, fresh_norm(), parameters, threshold, x.dtype, activations=False)
        assert a is None
        leaves = [x, *parameters, *([threshold] if signs == "thresholds" else [])]
        results.append([s, *torch.autograd.grad((s.float() * direction).sum(), leaves)])
    (ours, *gradients), (theirs, *expected) = results
    assert torch.equal(ours.float(), theirs)
    for one, two in zip(gradients, expected, strict=True):
        assert F.cosine_similarity(one.float().flatten(), two.flatten(), dim=0) > 0.999


FORMULAS = {  # of a and t, in float64
    POLYNOMIAL: lambda a, t: (2 - 2 * a.abs()).clamp(min=0),
    CLIPPED: lambda a, t: (a.abs() <= 1).double(),
    DECAY: lambda a, t: max(1 / t, 1) * t / torch.cosh(a) ** 2,
}


@pytest.mark.parametrize("thresholded", [False, True])
@pytest.mark.parametrize(("kind", "t"), [(POLYNOMIAL, 1.0), (CLIPPED, 1.0), (DECAY, 0.1), (DECAY, 1.0), (DECAY, 10.0)])
def test_gradients_of_signs_are_those_of_their_formulas(kind, t, thresholded):
    torch.manual_seed(0)
    a, threshold = (4 * channels_last(3, 16, 20, 20)).detach(), torch.randn(16, 1, 1) if thresholded else None
    a[0, 0, 0, :4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    direction = torch.randn(a.shape)
    leaves = [leaf.requires_grad_() for leaf in (a, threshold) if leaf is not None]
    s = kernels.signs_of(a, Estimator(kind, threshold, t), torch.float32)
    assert torch.equal(s, torch.where(a >= (0 if threshold is None else threshold), 1.0, -1.0))
    ours = torch.autograd.grad((s * direction).sum(), leaves)
    shifted = (a if threshold is None else a - threshold).detach()
    scaled = shifted * t if kind is DECAY else shifted  # rounded to float32, as in torch
    expected = FORMULAS[kind](scaled.double(), t) * direction
    torch.testing.assert_close(ours[0].double(), expected, rtol=2e-6, atol=1e-30)
    if threshold is not None:
        torch.testing.assert_close(ours[1].double(), -expected.sum((0, 2, 3)).view(16, 1, 1), rtol=1e-4, atol=1e-5)


def test_gradient_of_alpha_is_what_epsilon_leaves_of_it():
    """Batch norm divides alpha out again, so plain float32 gives little but rounding; float64 shows the truth."""
    torch.manual_seed(0)
    u, alpha, direction = 0.01 * torch.randn(4, 32, 6, 6), 0.1 * torch.rand(32, 1, 1), torch.randn(4, 32, 6, 6)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        x, scale = u.to(dtype), alpha.to(dtype).requires_grad_()
        norm = nn.BatchNorm2d(32).to(dtype)
        if dtype is torch.float32:
            x = x.to(memory_format=torch.channels_last)
            out = kernels.unit(x, scale, norm, None, signs=None, activations=True)[0]
        else:
            out = norm(x * scale)
        gradients.append(torch.autograd.grad((out * direction).sum(), scale)[0].double())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=0)


def test_unit_in_bfloat16_rounds_its_sums_and_gradients_alone():
    torch.manual_seed(0)
    u = (2 * torch.randint(-40, 40, (3, 32, 6, 6))).to(torch.bfloat16).to(memory_format=torch.channels_last)
    direction = torch.randn(3, 32, 6, 6)
    gradients, outputs = [], []
    for x in (u.requires_grad_(), u.detach().float().requires_grad_()):
        torch.manual_seed(1)
        a, s = kernels.unit(x, None, fresh_norm(), None, activation=HARDTANH, signs=x.dtype, activations=False)
        assert a is None
        assert s.dtype == x.dtype
        outputs.append(s.float())
        gradients.append(torch.autograd.grad((s.float() * direction).sum(), x)[0].float().flatten())
    assert torch.equal(*outputs)
    assert F.cosine_similarity(*gradients, dim=0) > 0.9999


def test_unit_in_evaluation_uses_the_running_statistics():
    torch.manual_seed(0)
    norm, u, alpha = fresh_norm().eval(), channels_last(2, 32, 4, 4), torch.randn(32, 1, 1)
    before = norm.running_mean.clone()
    with torch.no_grad():
        a, _ = kernels.unit(u, alpha, norm, None, activation=HARDTANH, signs=None, activations=True)
        torch.testing.assert_close(a, F.hardtanh(norm(u * alpha)), atol=1e-5, rtol=1e-5)
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_standardized_signs(dtype):
    torch.manual_seed(0)
    a, direction = channels_last(3, 16, 5, 5), torch.randn(3, 16, 5, 5)
    ours, theirs = kernels.signs_of(a, kernels.STANDARDIZED, dtype), standardized_sign(a)
    assert ours.dtype == dtype
    assert torch.equal(ours.float(), theirs)
    one, two = (torch.autograd.grad((s.float() * direction).sum(), a)[0] for s in (ours, theirs))
    torch.testing.assert_close(one, two, atol=1e-5 if dtype is torch.float32 else 2e-2, rtol=1e-4)


@pytest.mark.parametrize("freq", [1.0, 20.0])
def test_sine_and_cosine_are_exact_to_the_last_places(freq):
    w = torch.cat([torch.linspace(-300, 300, 160_000) / freq, torch.zeros(16), torch.full((16,), -0.0)])
    w = w.view(-1, 16, 1, 1).requires_grad_()
    true = w.detach().double() * torch.tensor(freq, dtype=torch.float64)
    rounded = (w.detach() * freq).double()  # the product is rounded to float32, the same in torch.sin(freq * w)
    real = kernels.periodic_weights(w, freq, False, torch.float32)
    assert (real.double() - rounded.sin()).abs().max() < 2e-7
    binary = kernels.periodic_weights(w, freq, True, torch.bfloat16)
    assert torch.equal(binary.float(), torch.where(torch.sin(freq * w) >= 0, 1.0, -1.0))
    slope = torch.autograd.grad(real.sum(), w)[0]
    assert (slope.double() - freq * rounded.cos()).abs().max() < 3e-7 * freq
    penalty = kernels.mean_squared_sines([w], [freq])
    assert penalty.item() == pytest.approx(true.sin().square().mean().item(), rel=1e-5)
    pull = torch.autograd.grad(3 * penalty, w)[0].double() * w.numel() / 3
    assert (pull - freq * (2 * rounded).sin()).abs().max() < 2e-6 * freq


def test_what_is_no_number_stays_visible():
    u = torch.ones(2, 16, 2, 2).to(memory_format=torch.channels_last)
    u[0, 3, 0, 0] = math.nan
    norm = nn.BatchNorm2d(16)
    a, _ = kernels.unit(u, None, norm, None, activation=HARDTANH, signs=None, activations=True)
    assert a[:, 3].isnan().all()
    assert not a[:, :3].isnan().any()
    assert norm.running_var[3].isnan()
    rounded = kernels.periodic_weights(torch.full((1, 16, 1, 1), math.nan), 20.0, False, torch.bfloat16)
    assert rounded.isnan().all()
    slopes = torch.full((16,), 0.25)
    a, _ = kernels.unit(
        u, None, norm, None, activation=Activation(ActivationKind.PRELU, slopes), signs=None, activations=True
    )
    assert a[:, 3].isnan().all()
    u.requires_grad_()
    signs = kernels.signs_of(u, Estimator(DECAY), torch.float32)
    assert torch.equal(torch.autograd.grad(signs.sum(), u)[0].isnan(), u.isnan())


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("activation", ["hardtanh", "prelu", "rprelu"])
def test_the_number_of_threads_changes_nothing(activation, signs):
    torch.manual_seed(0)
    u, skip, results = channels_last(5, 32, 8, 8), channels_last(5, 32, 8, 8), []
    parameters, threshold = parameters_of(activation), torch.randn(32, 1, 1).requires_grad_()
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        norm = fresh_norm()
        a, s = ours_of(signs, u, skip, norm, parameters, threshold)
        leaves = [u, skip, norm.weight, *parameters, *([threshold] if signs == "thresholds" else [])]
        gradients = torch.autograd.grad((a * s).sum(), leaves)
        results.append([a, norm.running_var, *gradients, kernels.mean_squared_sines([u], [3.0])])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
