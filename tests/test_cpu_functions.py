"""The CPU kernels against the plain operations that they stand for."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from biper.cpu import functions as kernels
from biper.nn.functional import standardized_sign


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
    a, s = kernels.unit(u, alpha, norm, skip, clamp=clamp, signs=torch.float32, activations=True)
    expected = plain_unit(u, alpha, other, skip, clamp)
    torch.testing.assert_close(a, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(s, torch.where(a >= 0, 1.0, -1.0))
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(buffer, other.get_buffer(name))
    to_signs, to_activations = torch.randn(*shape), torch.randn(*shape)
    leaves = [t for t in (u, skip) if t is not None]
    ours = torch.autograd.grad((s * to_signs + a * to_activations).sum(), [*leaves, norm.weight, norm.bias])
    loss = (standardized_sign(expected) * to_signs + expected * to_activations).sum()
    for one, two in zip(ours, torch.autograd.grad(loss, [*leaves, other.weight, other.bias]), strict=True):
        torch.testing.assert_close(one, two, atol=2e-4, rtol=2e-4)


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
            out = kernels.unit(x, scale, norm, None, clamp=False, signs=None, activations=True)[0]
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
        a, s = kernels.unit(x, None, fresh_norm(), None, clamp=True, signs=x.dtype, activations=False)
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
        a, _ = kernels.unit(u, alpha, norm, None, clamp=True, signs=None, activations=True)
        torch.testing.assert_close(a, F.hardtanh(norm(u * alpha)), atol=1e-5, rtol=1e-5)
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_standardized_signs(dtype):
    torch.manual_seed(0)
    a, direction = channels_last(3, 16, 5, 5), torch.randn(3, 16, 5, 5)
    ours, theirs = kernels.standardized_signs(a, dtype), standardized_sign(a)
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
    a, _ = kernels.unit(u, None, norm, None, clamp=True, signs=None, activations=True)
    assert a[:, 3].isnan().all()
    assert not a[:, :3].isnan().any()
    assert norm.running_var[3].isnan()
    rounded = kernels.periodic_weights(torch.full((1, 16, 1, 1), math.nan), 20.0, False, torch.bfloat16)
    assert rounded.isnan().all()


def test_the_number_of_threads_changes_nothing():
    torch.manual_seed(0)
    u, results = channels_last(5, 32, 8, 8), []
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        norm = fresh_norm()
        a, s = kernels.unit(u, None, norm, None, clamp=True, signs=torch.float32, activations=True)
        gradient = torch.autograd.grad((a * s).sum(), [u, norm.weight])
        results.append([a, norm.running_var, *gradient, kernels.mean_squared_sines([u], [3.0])])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
