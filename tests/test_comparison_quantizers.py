"""The published quantizers against their papers' formulas in float64, value and gradient, at several moments."""

import math

import pytest
import torch

import biper
from biper.errors import UsageError
from biper.nn import comparison_quantizers
from biper.nn.activations import RPReLU
from biper.nn.comparison_quantizers import XNOR, ErrorDecaySign, IRNet, ReCU, RSign

PROGRESS = (0.0, 0.3, 1.0)


def weights(requires_grad=True):
    torch.manual_seed(0)
    return (0.7 * torch.randn(6, 3, 3, 3, dtype=torch.float64) + 0.1).requires_grad_(requires_grad)


def sign(x):
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def with_gradient(value, surrogate):
    """value, whose gradient is the surrogate's."""
    return value.detach() + surrogate - surrogate.detach()


def standardized(w, factor=1.0, epsilon=0.0):
    mean = w.mean((1, 2, 3), keepdim=True)
    squares = ((w - mean) ** 2).sum((1, 2, 3), keepdim=True) / (w[0].numel() - 1)
    return factor * (w - mean) / torch.sqrt(squares + epsilon)


def decaying(x, progress, t_min=0.1, t_max=10.0):
    """The integral of k*t*(1 - tanh(t*x)**2)."""
    t = t_min * 10 ** (progress * math.log10(t_max / t_min))
    return max(1 / t, 1) * torch.tanh(t * x)


def published(name, w, progress):
    """(effective weights, real weights) as the papers write them."""
    if name == "xnor":
        scale = w.abs().mean((1, 2, 3), keepdim=True)
        return scale * with_gradient(sign(w), w.clamp(-1, 1)), w
    if name == "irnet":
        v = standardized(w)
        shift = torch.round(torch.log2(v.detach().abs().mean((1, 2, 3), keepdim=True)))
        return with_gradient(sign(v), decaying(v, progress)) * 2**shift, v
    v = standardized(w, 2 * math.sqrt(2), 1e-5)
    tau = (0.99 - 0.85) / (math.e - 1) * math.exp(progress) + 0.85 - (0.99 - 0.85) / (math.e - 1)
    q = -v.detach().abs().mean() * math.log(2 - 2 * tau)
    r = v.clamp(-q.item(), q.item())
    return with_gradient(sign(r), r), r


def test_weights_that_are_all_equal_have_a_scale_of_one():
    torch.testing.assert_close(IRNet().scale(torch.full((2, 3, 3, 3), 0.5)).flatten(), torch.ones(2))


@pytest.mark.parametrize("progress", PROGRESS)
@pytest.mark.parametrize("kind", [XNOR, IRNet, ReCU], ids=lambda kind: kind.name)
def test_weights_are_the_papers(kind, progress):
    quantizer, w = kind().double(), weights()
    quantizer.set_progress(progress)
    expected, real = published(kind.name, w, progress)
    torch.testing.assert_close(quantizer.effective(w), expected)
    torch.testing.assert_close(quantizer.real(w), real)
    assert torch.equal(quantizer.signs(w), sign(real))
    direction = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((x * direction).sum(), w)[0] for x in (quantizer.effective(w), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("progress", PROGRESS)
def test_error_decay_of_inputs(progress):
    quantizer, a = ErrorDecaySign().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    quantizer.set_progress(progress)
    expected = with_gradient(sign(a), decaying(a, progress))
    assert torch.equal(quantizer(a), sign(a))
    direction = torch.randn_like(a)
    ours, theirs = (torch.autograd.grad((x * direction).sum(), a)[0] for x in (quantizer(a), expected))
    torch.testing.assert_close(ours, theirs)


def test_rsign_learns_its_thresholds():
    layer = biper.BinaryConv2d(3, 4, 1, input_quantizer=RSign(), dtype=torch.float64)
    quantizer = layer.input_quantizer
    with torch.no_grad():
        quantizer.threshold.copy_(torch.tensor([-0.5, 0.0, 0.5]).view(3, 1, 1))
    a = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    a[0, :, 0, 0] = torch.tensor([-0.5, 0.0, 0.5])  # on the threshold it is +1
    a.requires_grad_()
    x = (a - quantizer.threshold).clamp(-1, 1)
    expected = with_gradient(sign(a - quantizer.threshold), 2 * x - x * x.abs())
    assert torch.equal(quantizer(a), sign(a - quantizer.threshold))
    direction, inputs = torch.randn_like(a), (a, quantizer.threshold)
    for ours, theirs in zip(
        torch.autograd.grad((quantizer(a) * direction).sum(), inputs),
        torch.autograd.grad((expected * direction).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_rsign_without_a_layer_says_what_it_lacks():
    with pytest.raises(UsageError, match="give it to a layer"):
        RSign()(torch.randn(2, 3, 4, 4))


def test_rsign_has_a_threshold_for_each_feature_of_a_linear_layer():
    layer = biper.BinaryLinear(5, 2, input_quantizer=RSign())
    assert layer(torch.randn(3, 4, 5)).shape == (3, 4, 2)
    assert layer.input_quantizer.threshold.shape == (5,)


def test_rprelu_is_shift_prelu_shift():
    activation, x = RPReLU(3).double(), torch.randn(2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    before, slope, after = (torch.randn(3, 1, 1, dtype=torch.float64).requires_grad_() for _ in range(3))
    with torch.no_grad():
        activation.before.copy_(before)
        activation.weight.copy_(slope.flatten())
        activation.after.copy_(after)
    y = x - before
    expected = torch.where(y > 0, y, slope * y) + after
    torch.testing.assert_close(activation(x), expected)
    direction = torch.randn_like(x)
    parameters = (x, activation.before, activation.weight, activation.after)
    ours = torch.autograd.grad((activation(x) * direction).sum(), parameters)
    for mine, theirs in zip(
        ours, torch.autograd.grad((expected * direction).sum(), (x, before, slope, after)), strict=True
    ):
        torch.testing.assert_close(mine.flatten(), theirs.flatten())


@pytest.mark.parametrize("value", [0.5, 0.3])  # the mean of one of them is rounded
@pytest.mark.parametrize("kind", [XNOR, IRNet, ReCU], ids=lambda kind: kind.name)
def test_equal_weights_have_signs_and_no_huge_gradients(kind, value):
    w = torch.full((2, 4, 3, 3), value, requires_grad=True)
    kind().effective(w).sum().backward()
    assert w.grad.abs().max() < 1e3
    assert kind().signs(w).abs().eq(1).all()


@pytest.mark.parametrize(
    "build", [lambda: IRNet(0.0), lambda: IRNet(2.0, 1.0), lambda: ErrorDecaySign(t_max=math.inf), lambda: ReCU(0.4)]
)
def test_settings_out_of_bounds_are_refused(build):
    with pytest.raises(UsageError, match="takes 0"):
        build()


@pytest.mark.parametrize("name", ["recu", "irnet"])
def test_what_follows_from_progress_is_not_in_the_state_dict(name):
    from biper.nn.quantizers import WEIGHT_QUANTIZERS

    assert not WEIGHT_QUANTIZERS[name]().state_dict()


def test_weights_may_be_written_to_between_the_passes():
    """As clamping them after each step of several that share a graph does."""
    w = torch.randn(4, 3, 2, 2, requires_grad=True)
    y = comparison_quantizers.standardized(w)
    with torch.no_grad():
        w.add_(1)
    y.square().sum().backward()
    assert w.grad.isfinite().all()
