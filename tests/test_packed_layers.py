"""Packed convolutions against the training ones: integer sums bit for bit, on every way to count bits."""

import random

import pytest
import torch
from torch import nn

from biper import BinaryConv2d
from biper.errors import UsageError
from biper.nn.quantizers import Sine, SquareWave
from biper.packed import runtime as kernels
from biper.packed.bits import border, pack_bits, unpack_bits
from biper.packed.layers import FoldedNorm, PackedConv2d

WAYS = kernels.available()


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setenv(kernels.CHOICE, request.param)
    return request.param


def random_layer(draw, bias=False):
    groups = draw.choice([1, 1, 1, 2, 3, 4])
    channels = groups * draw.choice([1, 3, 8, 12, 16, 17, 32, 64, 65, 100])
    out_channels = groups * draw.choice([1, 3, 8, 16, 20, 32, 40])
    if draw.random() < 0.2:  # depth-wise
        groups = channels = draw.choice([2, 8, 20, 33])
        out_channels = channels * draw.choice([1, 2])
    kernel, stride, padding = draw.choice([1, 2, 3, 5]), draw.choice([1, 2, 3]), draw.choice([0, 1, 2])
    dilation = draw.choice([(1, 1), (1, 1), (2, 2), (1, 3), (4, 1), (2, 3)])
    how = {"dilation": dilation, "groups": groups, "bias": bias, "weight_quantizer": SquareWave(20.0)}
    layer = BinaryConv2d(channels, out_channels, kernel, stride, padding, **how).eval()
    least = (max(1, d * (kernel - 1) + 1 - 2 * padding) for d in dilation)
    x = torch.randn(draw.choice([1, 2, 3, 5]), channels, *(draw.randint(n, n + 6) for n in least))
    return layer, x.where(x.abs() > 0.05, 0)  # zeros too: their sign is +1


@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.no_grad()
def test_sums_equal_the_training_layers_bit_for_bit(way, threads):
    torch.set_num_threads(threads)
    draw = random.Random(threads)
    torch.manual_seed(threads)
    for _ in range(60):
        layer, x = random_layer(draw)
        layer.alpha.fill_(1)
        sums = PackedConv2d.of(layer)(x)
        assert torch.equal(sums, layer(x)), (layer, x.shape)
        assert torch.equal(sums, sums.round())


@torch.no_grad()
def test_alpha_and_layouts(way):
    layer, x = BinaryConv2d(40, 24, 3, padding=1, weight_quantizer=SquareWave(20.0)).eval(), torch.randn(2, 40, 7, 5)
    layer.alpha.copy_(torch.randn(24, 1, 1))
    packed = PackedConv2d.of(layer)
    assert torch.equal(packed(x), layer(x))
    assert torch.equal(packed(x.contiguous(memory_format=torch.channels_last)), layer(x))
    assert torch.equal(packed(x.double()).float(), layer(x))
    assert packed(x[:0]).shape == (0, 24, 7, 5)


@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.no_grad()
def test_scaled_and_biased_sums_equal_the_training_layers_bit_for_bit(way, threads):
    torch.set_num_threads(threads)
    draw = random.Random(threads)
    torch.manual_seed(threads)
    for _ in range(40):
        layer, x = random_layer(draw, bias=True)
        layer.alpha.normal_()
        layer.bias.normal_()
        assert torch.equal(PackedConv2d.of(layer)(x), layer(x)), (layer, x.shape)


@torch.no_grad()
def test_a_bias_is_kept_where_there_is_one():
    layer, x = BinaryConv2d(8, 5, 3, bias=True, weight_quantizer=SquareWave(20.0)).eval(), torch.randn(2, 8, 6, 6)
    packed = PackedConv2d.of(layer)
    assert set(packed.state_dict()) == {"bits", "alpha", "bias"}
    assert set(PackedConv2d.of(BinaryConv2d(8, 5, 3, weight_quantizer=SquareWave(20.0))).state_dict()) == {
        "bits",
        "alpha",
    }
    assert torch.equal(packed.bias, layer.bias)
    assert torch.equal(packed.double()(x.double()), layer.double()(x.double()))


@torch.no_grad()
def test_real_activations_meet_binary_weights(way):
    layer = BinaryConv2d(12, 5, 3, padding=1, weight_quantizer=SquareWave(20.0), input_quantizer=None).eval()
    x = torch.randn(2, 12, 6, 6)
    assert torch.equal(PackedConv2d.of(layer)(x), layer(x))


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (7, 1), (16, 1), (64, 1), (65, 1), (16, 4), (33, 3)])
def test_bits_give_the_weights_back(channels, groups):
    weight = torch.randn(groups * 10, channels, 3, 3).sign()
    bits = pack_bits(weight, groups)
    assert torch.equal(unpack_bits(bits, groups * 10, channels, (3, 3), groups, torch.float32), weight)
    assert bits.shape[1:] == (-(-9 * 8 * -(-channels // 8) // 64), 16)


@pytest.mark.parametrize(("dilation", "padding"), [((1, 1), (1, 1)), ((3, 2), (3, 2)), ((4, 5), (5, 6))])
def test_border_counts_the_terms_inside_the_image(dilation, padding):
    masks, terms, rows, kinds = border(20, (3, 3), (1, 1), padding, dilation, (4, 5))
    ones, weights = torch.ones(1, 20, 4, 5), torch.ones(1, 20, 3, 3)
    counted = torch.nn.functional.conv2d(ones, weights, padding=padding, dilation=dilation)[0, 0]
    places = kinds[: len(counted), None] + kinds[None, len(counted) :]
    assert torch.equal(terms[places].float(), counted)
    for kind in range(len(masks)):
        assert sum(bin(word & (1 << 32) - 1).count("1") for word in masks[kind].tolist()) == terms[kind]
        assert kind in places[rows[kind]]
    assert len(masks) == 9


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(900), nn.BatchNorm2d(900, affine=False), nn.BatchNorm1d(900)])
@torch.no_grad()
def test_folded_norm_has_the_bits_of_the_batch_norm(norm):
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 30)
    if norm.affine:
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(4, 900, 6, 6) if isinstance(norm, nn.BatchNorm2d) else torch.randn(40, 900)
    assert torch.equal(FoldedNorm.of(norm.eval())(x), norm(x))


def test_stage_1_cannot_be_packed():
    with pytest.raises(UsageError, match="weights of Sine are real"):
        PackedConv2d.of(BinaryConv2d(3, 4, 3, weight_quantizer=Sine(20.0)))


def test_unknown_way_is_refused(monkeypatch):
    monkeypatch.setenv(kernels.CHOICE, "abacus")
    with pytest.raises(UsageError, match="BIPER_POPCOUNT=abacus cannot run here: choose from"):
        PackedConv2d.of(BinaryConv2d(3, 4, 3, weight_quantizer=SquareWave(20.0)))(torch.randn(1, 3, 5, 5))


def test_layer_says_what_it_is():
    assert "3, 4, kernel_size=(3, 3)" in repr(PackedConv2d.of(BinaryConv2d(3, 4, 3, weight_quantizer=SquareWave(20.0))))


def test_operator_passes_torchs_own_checks():
    layer = PackedConv2d.of(BinaryConv2d(8, 16, 3, padding=1, weight_quantizer=SquareWave(20.0)))
    arguments = torch.randn(2, 8, 5, 5), layer.bits, layer.alpha, [3, 3], [1, 1], [1, 1], 1, True
    torch.library.opcheck(torch.ops.biper.binary_conv2d.default, arguments)
    torch.library.opcheck(torch.ops.biper.binary_conv2d.default, (*arguments, torch.randn(16), [1, 2]))


@pytest.mark.parametrize(
    ("padding", "kernel", "dilation", "pixels"),
    [("valid", 3, 2, (0, 0)), ("same", 3, 1, (1, 1)), ("same", (5, 3), (1, 2), (2, 2)), ("same", 2, 2, (1, 1))],
)
@torch.no_grad()
def test_padding_in_words(way, padding, kernel, dilation, pixels):
    layer = BinaryConv2d(8, 16, kernel, padding=padding, dilation=dilation, weight_quantizer=SquareWave(20.0)).eval()
    packed, x = PackedConv2d.of(layer), torch.randn(2, 8, 7, 6)
    assert packed.padding == pixels
    assert torch.equal(packed(x), layer(x))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_is_refused_by_name(mode):
    layer = BinaryConv2d(8, 16, 3, padding=1, weight_quantizer=SquareWave(20.0))
    layer.padding_mode = mode
    with pytest.raises(UsageError, match=f"only zero padding can be packed, not padding_mode='{mode}'"):
        PackedConv2d.of(layer)


def test_padding_of_one_side_more_is_refused():
    with pytest.raises(UsageError, match=r"padding='same' of a kernel \(2, 2\) is wider on one side"):
        PackedConv2d.of(BinaryConv2d(8, 16, 2, padding="same", weight_quantizer=SquareWave(20.0)))


def test_the_operator_refuses_a_bias_of_another_length():
    layer = PackedConv2d.of(BinaryConv2d(8, 16, 3, padding=1, weight_quantizer=SquareWave(20.0)))
    given = torch.randn(2, 8, 5, 5), layer.bits, layer.alpha, [3, 3], [1, 1], [1, 1], 1, True
    with pytest.raises(RuntimeError, match="reads 16 numbers of a parameter that has 1"):
        torch.ops.biper.binary_conv2d(*given, torch.zeros(1))
