import pytest
import torch
import torch.nn.functional as F

from biper import BinaryConv2d
from biper.nn.layers import RealConv2d, RealLinear, binary_layers


def reference(layer, a, training):
    """The same layer spelled out with plain operations; gradients by autograd through the surrogates' integrals."""
    if layer.binary_activations:
        x = a / torch.sqrt(a.var(dim=(1, 2, 3), keepdim=True) + 1e-5) if training else a
        clipped = x.clamp(-1, 1)
        surrogate = 2 * clipped - clipped * clipped.abs()  # its derivative is max(0, 2 - 2|x|)
        a = surrogate + (torch.where(x >= 0, 1.0, -1.0) - surrogate).detach()
    w = torch.sin(layer.freq * layer.weight)
    if layer.stage == 2:
        w = w + (torch.where(w >= 0, 1.0, -1.0) - w).detach()
    return F.conv2d(a, w, None, layer.stride, layer.padding, groups=layer.groups) * layer.alpha


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("binary_activations", [True, False])
@pytest.mark.parametrize("shape", [{"stride": 2, "padding": 1}, {"groups": 2, "padding": 0}])
def test_output_and_gradients_are_those_of_plain_operations(stage, training, binary_activations, shape):
    torch.manual_seed(0)
    layer = BinaryConv2d(4, 6, 3, freq=20.0, stage=stage, binary_activations=binary_activations, **shape).double()
    layer.train(training)
    a = torch.randn(2, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    leaves = (a, layer.weight, layer.alpha)
    direction = torch.randn_like(layer(a))
    expected = reference(layer, a, training)
    torch.testing.assert_close(layer(a), expected)
    ours = torch.autograd.grad((layer(a) * direction).sum(), leaves)
    theirs = torch.autograd.grad((expected * direction).sum(), leaves)
    for gradient, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other)


def test_padding_stays_zero():
    layer = BinaryConv2d(1, 1, 3, padding=1, stage=2).eval()
    with torch.no_grad():
        layer.weight.fill_(0.01)  # +1 everywhere
        layer.alpha.fill_(1)
    assert layer(torch.ones(1, 1, 3, 3))[0, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]


def test_stage_2_weights_are_two_valued():
    assert set(BinaryConv2d(8, 8, 3, stage=2).effective_weight().unique().tolist()) == {-1, 1}


def test_alpha_starts_between_zero_and_one():
    alpha = BinaryConv2d(2, 500, 1).alpha
    assert alpha.shape == (500, 1, 1)
    assert 0 <= alpha.min() < 0.05 < 0.95 < alpha.max() <= 1


@pytest.mark.parametrize("wrong", [{"stage": 3}, {"freq": 0.0}, {"freq": -1.0}, {"freq": float("nan")}])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=r"stage|freq"):
        BinaryConv2d(1, 1, 3, **wrong)


def test_binary_layers_and_repr():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), BinaryConv2d(4, 4, 3, freq=7.0))
    assert [name for name, _ in binary_layers(network)] == ["1"]
    assert "freq=7.0, stage=1" in repr(network)


def test_sums_of_signs_are_exact_in_bfloat16():
    """56 channels and 3x3 weights: at most 504 terms, an even number of them; every even number to 512 is exact."""
    torch.manual_seed(0)
    layer = BinaryConv2d(56, 32, 3, padding=1, stage=2)
    with torch.no_grad():
        layer.weight[0] = layer.weight[0].abs().clamp(max=0.1)  # +1 everywhere: the largest sums
    a = torch.randn(2, 56, 9, 9).abs()
    a[1] *= torch.randn(56, 9, 9).sign()
    expected = layer(a)
    with torch.autocast("cpu", torch.bfloat16):
        ours = layer(a)
    assert (expected / layer.alpha).max() == 504
    assert ours.dtype == torch.float32
    assert torch.equal(ours, expected)


def test_real_layers_stay_float32_under_autocast():
    torch.manual_seed(0)
    conv, linear = RealConv2d(3, 8, 3, stride=2, padding=1, bias=False), RealLinear(5, 4)
    x, y = torch.randn(2, 3, 9, 9, requires_grad=True), torch.randn(2, 5)
    expected = conv(x), linear(y)
    gradients = torch.autograd.grad(expected[0].square().sum(), [x, conv.weight])
    with torch.autocast("cpu", torch.bfloat16):
        ours = conv(x), linear(y)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])
    for one, two in zip(torch.autograd.grad(ours[0].square().sum(), [x, conv.weight]), gradients, strict=True):
        assert one.dtype == torch.float32
        assert F.cosine_similarity(one.flatten(), two.flatten(), dim=0) > 0.9999
