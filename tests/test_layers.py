import pytest
import torch
import torch.nn.functional as F

from biper import BinaryConv2d, BinaryLinear, PolynomialSign, Sign, Sine, SquareWave, binarize_
from biper.errors import UsageError
from biper.nn.layers import RealConv2d, RealLinear, binary_layers
from biper.nn.quantizers import describe


def reference(layer, a, training):
    """The same layer spelled out with plain operations; gradients by autograd through the surrogates' integrals."""
    if layer.input_quantizer is not None:
        dims = tuple(range(1, a.dim()))
        x = a / torch.sqrt(a.var(dim=dims, keepdim=True) + 1e-5) if training else a
        clipped = x.clamp(-1, 1)
        surrogate = 2 * clipped - clipped * clipped.abs()  # its derivative is max(0, 2 - 2|x|)
        a = surrogate + (torch.where(x >= 0, 1.0, -1.0) - surrogate).detach()
    w = torch.sin(layer.weight_quantizer.freq * layer.weight)
    if layer.weight_quantizer.binary:
        w = w + (torch.where(w >= 0, 1.0, -1.0) - w).detach()
    if isinstance(layer, BinaryLinear):
        return F.linear(a, w * layer.alpha[:, None], layer.bias)
    return F.conv2d(
        a, w * layer.alpha[..., None], layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )


CONVOLUTIONS = [
    {"stride": 2, "padding": 1},
    {"groups": 2, "bias": True},
    {"dilation": 2, "padding": (2, 1)},
    {"padding": "same", "groups": 2, "bias": True},
]


@pytest.mark.parametrize("weights", [Sine(20.0), SquareWave(20.0)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inputs", [PolynomialSign(), None], ids=str)
@pytest.mark.parametrize("shape", [*CONVOLUTIONS, None])
def test_output_and_gradients_are_those_of_plain_operations(weights, training, inputs, shape):
    torch.manual_seed(0)
    quantizers = {"weight_quantizer": weights, "input_quantizer": inputs}
    if shape is None:
        layer, a = BinaryLinear(5, 3, **quantizers), torch.randn(2, 4, 5)
    else:
        layer, a = BinaryConv2d(4, 6, 3, **shape, **quantizers), torch.randn(2, 4, 7, 7)
    layer, a = layer.double().train(training), a.double().requires_grad_()
    leaves = (a, *layer.parameters())
    direction = torch.randn_like(layer(a))
    expected = reference(layer, a, training)
    torch.testing.assert_close(layer(a), expected)
    ours = torch.autograd.grad((layer(a) * direction).sum(), leaves)
    theirs = torch.autograd.grad((expected * direction).sum(), leaves)
    for gradient, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other)


def test_padding_stays_zero():
    layer = BinaryConv2d(1, 1, 3, padding=1, weight_quantizer=SquareWave(20.0)).eval()
    with torch.no_grad():
        layer.weight.fill_(0.01)  # +1 everywhere
        layer.alpha.fill_(1)
    assert layer(torch.ones(1, 1, 3, 3))[0, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]


def test_stage_2_weights_are_two_valued():
    assert set(BinaryConv2d(8, 8, 3, weight_quantizer=SquareWave(20.0)).effective_weight().unique().tolist()) == {-1, 1}


def test_alpha_starts_between_zero_and_one():
    alpha = BinaryConv2d(2, 500, 1).alpha
    assert alpha.shape == (500, 1, 1)
    assert 0 <= alpha.min() < 0.05 < 0.95 < alpha.max() <= 1


def test_other_paddings_unbatched_inputs_and_things_that_are_no_quantizers_are_refused_by_name():
    with pytest.raises(UsageError, match="padding_mode 'reflect'"):
        BinaryConv2d(1, 1, 3, padding=1, padding_mode="reflect")
    with pytest.raises(UsageError, match=r"takes batches \(N, C, H, W\), not \(8, 5, 5\)"):
        BinaryConv2d(8, 8, 3)(torch.randn(8, 5, 5))
    with pytest.raises(UsageError, match=r"takes batches .*, not \(8,\)"):
        BinaryLinear(8, 8)(torch.randn(8))
    with pytest.raises(UsageError, match="expected a WeightQuantizer"):
        BinaryConv2d(8, 8, 3, weight_quantizer=PolynomialSign())
    with pytest.raises(UsageError, match="expected a InputQuantizer"):
        BinaryLinear(8, 8, input_quantizer="sign")


def test_device_and_dtype():
    for layer in (
        BinaryConv2d(2, 3, 1, device="meta", dtype=torch.float64, bias=True),
        BinaryLinear(2, 3, device="meta"),
    ):
        assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert BinaryConv2d(2, 3, 1, dtype=torch.float64)(torch.randn(1, 2, 1, 1).double()).dtype == torch.float64


def test_layers_have_quantizers_of_their_own():
    quantizer = Sine(7.0)
    network = torch.nn.Sequential(*(BinaryConv2d(4, 4, 3, weight_quantizer=quantizer) for _ in range(2)))
    network[0].weight_quantizer.freq = 8.0
    assert (quantizer.freq, network[1].weight_quantizer.freq) == (7, 7)


def test_binary_layers_and_repr():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), BinaryConv2d(4, 4, 3, weight_quantizer=Sine(7.0)))
    assert [name for name, _ in binary_layers(network)] == ["1"]
    assert "Sine(freq=7.0)" in repr(network)


def test_binarize_keeps_the_latent_weights_and_takes_the_signs_of_the_real_ones():
    layers = BinaryConv2d(3, 4, 3, weight_quantizer=Sine(7.0)), BinaryLinear(4, 4, weight_quantizer=Sign())
    network = torch.nn.Sequential(*layers).eval()
    latent, real = layers[0].weight.clone(), layers[0].effective_weight()
    assert binarize_(network) is network
    assert torch.equal(layers[0].weight, latent)
    assert torch.equal(layers[0].effective_weight(), torch.where(real >= 0, 1.0, -1.0))
    assert describe(layers[0].weight_quantizer) == {"name": "square_wave", "freq": 7.0}
    assert describe(layers[1].weight_quantizer) == {"name": "sign"}
    assert not any(module.training for module in network.modules())

    class Real(Sine):
        def binarized(self):
            return self

    layers = BinaryLinear(2, 2), BinaryLinear(2, 2, weight_quantizer=Real(1.0))
    with pytest.raises(UsageError, match="Real is real"):
        binarize_(torch.nn.Sequential(*layers))
    assert not layers[0].weight_quantizer.binary  # nothing was changed
    with pytest.raises(UsageError, match="nothing to make binary"):
        binarize_(torch.nn.Linear(2, 2))


def test_inputs_without_a_negative_one_are_warned_of_once():
    layer = BinaryConv2d(4, 4, 3)
    with pytest.warns(UserWarning, match="sees no negative input"):
        layer(torch.rand(2, 4, 5, 5))
    layer(torch.rand(2, 4, 5, 5))  # warnings are errors here
    BinaryConv2d(4, 4, 3).eval()(torch.rand(2, 4, 5, 5))
    BinaryConv2d(4, 4, 3, input_quantizer=None)(torch.rand(2, 4, 5, 5))
    BinaryConv2d(4, 4, 3)(torch.randn(2, 4, 5, 5))
    BinaryConv2d(4, 4, 3)(torch.rand(0, 4, 5, 5))  # no inputs at all


def test_sums_of_signs_are_exact_in_bfloat16():
    """56 channels and 3x3 weights: at most 504 terms, an even number of them; every even number to 512 is exact."""
    torch.manual_seed(0)
    layer = BinaryConv2d(56, 32, 3, padding=1, weight_quantizer=SquareWave(20.0))
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
