import math

import pytest
import torch

from biper.nn.comparison_quantizers import standardized
from biper.nn.functional import binary_sign, sine, square_wave, standardized_sign, straight_through_sign


@pytest.mark.parametrize("w", [-0.3, -0.1, -1e-9, -0.0, 0.0, 1e-9, 0.1, 0.2, 1.7])
@pytest.mark.parametrize("freq", [1.0, 20.0])
def test_square_wave(w, freq):
    x = torch.tensor(w, requires_grad=True)
    y = square_wave(x, freq)
    y.backward()
    assert y.item() == (1 if math.sin(freq * w) >= 0 else -1)
    assert x.grad.item() == pytest.approx(freq * math.cos(freq * w), rel=1e-5)


def test_square_wave_and_sine_share_period_and_gradient():
    w = torch.linspace(-1, 1, 997, dtype=torch.float64, requires_grad=True)
    period = 2 * math.pi / 7
    far_from_zero = sine(w, 7.0).abs() > 1e-6
    assert torch.equal(square_wave(w, 7.0)[far_from_zero], square_wave(w + period, 7.0)[far_from_zero])
    weights = torch.randn(997, dtype=torch.float64)
    ours = torch.autograd.grad((square_wave(w, 7.0) * weights).sum(), w)[0]
    torch.testing.assert_close(ours, torch.autograd.grad((sine(w, 7.0) * weights).sum(), w)[0])


@pytest.mark.parametrize(("x", "value", "gradient"), [(-2, -1, 0), (-0.5, -1, 1), (0, 1, 2), (0.25, 1, 1.5), (1, 1, 0)])
def test_binary_sign(x, value, gradient):
    x = torch.tensor(float(x), requires_grad=True)
    y = binary_sign(x)
    y.backward()
    assert (y.item(), x.grad.item()) == (value, gradient)


@pytest.mark.parametrize(("x", "value", "gradient"), [(-2, -1, 0), (-1, -1, 1), (-0.5, -1, 1), (0, 1, 1), (1.1, 1, 0)])
def test_straight_through_sign(x, value, gradient):
    x = torch.tensor(float(x), requires_grad=True)
    y = straight_through_sign(x)
    y.backward()
    assert (y.item(), x.grad.item()) == (value, gradient)


@pytest.mark.parametrize("sign", [binary_sign, straight_through_sign])
def test_the_sign_of_negative_zero_is_plus_one(sign):
    assert sign(torch.tensor([-0.0, 0.0])).tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    x = torch.randn(5, dtype=dtype)
    assert square_wave(x, 20.0).dtype == binary_sign(x).dtype == dtype


def test_standardized_sign():
    torch.manual_seed(0)
    a = (3 * torch.randn(4, 5, 6, 7, dtype=torch.float64) + 1).requires_grad_()
    direction = torch.randn_like(a)
    variance = torch.stack([image.flatten().var(unbiased=True) for image in a])
    x = a / (variance + 1e-5).sqrt()[:, None, None, None]
    expected = torch.autograd.grad((binary_sign(x) * direction).sum(), a)[0]
    y = standardized_sign(a)
    assert torch.equal(y, torch.where(a >= 0, 1.0, -1.0).double())
    torch.testing.assert_close(torch.autograd.grad((y * direction).sum(), a)[0], expected)


def test_standardized_sign_keeps_one_tensor_of_the_size_of_the_activations():
    a = torch.randn(4, 5, 6, 7, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        standardized_sign(a)
    assert [t.shape for t in kept if t.numel() > len(a)] == [a.shape]
    assert kept[0].data_ptr() == a.data_ptr()


def test_standardized_sign_of_single_features_and_of_nothing():
    a = torch.tensor([[0.001], [-0.002]], requires_grad=True)  # whose variance is 0
    standardized_sign(a).sum().backward()
    window = 2 - 2 * a.detach().abs() / 1e-5**0.5
    torch.testing.assert_close(a.grad, window.clamp(min=0) / 1e-5**0.5)
    none = torch.zeros(0, 3, 4, 4, requires_grad=True)
    standardized_sign(none).sum().backward()
    assert none.grad.shape == none.shape


@pytest.mark.parametrize("function", [standardized_sign, standardized, lambda w: standardized(w, 0.1)])
def test_second_derivatives_are_those_of_the_gradient(function):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(function, x)
