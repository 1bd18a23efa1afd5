"""Convolutions of real values among a packed network's instructions: in a known order, torch's where they are taken."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import biper
from biper.nn.layers import BinaryConv2d
from biper.nn.quantizers import SquareWave
from biper.packed import compile as packed_compile
from biper.packed import runtime
from biper.packed.lowering import real_convolution
from biper.packed.program import SumOrder
from biper.packed.steps import Step

CASES = [(3, 16, 3, 1, 1), (3, 20, 7, 2, 3), (1, 5, (2, 3), (2, 1), (0, 2)), (40, 33, 1, 2, 0), (5, 64, 3, 3, 2)]


@pytest.fixture(params=[way for way in runtime.available() if way != runtime.TORCH])
def way(request, monkeypatch):
    """One way after the other in which this processor runs instructions."""
    monkeypatch.setenv(runtime.CHOICE, request.param)


def summed(x, conv, sum_order):
    """Product by product: in float64 each is exact, and rounding the sum once is what a fused operation does."""
    (top, left), (down, across), (high, wide) = conv.padding, conv.stride, conv.kernel_size
    x, w = F.pad(x.double(), (left, left, top, top)), conv.weight.double()
    rows, columns = (x.shape[2] - high) // down + 1, (x.shape[3] - wide) // across + 1
    nothing = torch.zeros(len(x), conv.out_channels, rows, columns)
    taps = itertools.product(range(high), range(wide))
    channels = range(conv.in_channels)
    order = [(c, i, j) for c in channels for i in range(high) for j in range(wide)]
    if not sum_order.channels_first:
        order = [(c, i, j) for i, j in taps for c in channels]
    size = sum_order.chunk or len(order)
    sums = []
    for chunk in (order[first : first + size] for first in range(0, len(order), size)):
        total = nothing
        for c, i, j in chunk:
            seen = x[:, c, i : i + down * (rows - 1) + 1 : down, j : j + across * (columns - 1) + 1 : across]
            total = (total.double() + seen[:, None] * w[:, c, i, j].view(1, -1, 1, 1)).float()
        sums.append(total)
    return functools.reduce(torch.add, sums)


@pytest.mark.parametrize("order", [SumOrder(False), SumOrder(True), SumOrder(chunk=16), SumOrder(True, 7)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("threads", "images", "sides"), [(1, 2, (9, 7)), (3, 1, (90, 7)), (3, 1, (7, 131))])
@torch.no_grad()
def test_products_are_added_up_in_the_order_that_is_given(way, case, order, threads, images, sides):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    conv = nn.Conv2d(*case, bias=False).requires_grad_(False)
    x = torch.randn(images, case[0], *sides)
    step = Step("real", conv, order=order)
    assert torch.equal(real_convolution(step, x), summed(x, conv, order))


@pytest.mark.parametrize("threads", [1, 3])
@torch.no_grad()
def test_a_first_layer_that_torch_adds_up_in_another_order_is_torchs(way, monkeypatch, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = biper.create_model("resnet20_1w1a", stage=2).eval()
    images = torch.randn(3, 3, 32, 32)
    found = {}
    for name, disturbance in (("same", 0.0), ("other", 1e-6)):
        monkeypatch.setattr(packed_compile, "real_convolution", lambda s, x, d=disturbance: real_convolution(s, x) + d)
        packed = biper.pack(network)
        assert torch.equal(packed(images), network(images))
        (segmented,) = packed._forwards.values()
        found[name] = [step.kind for step in segmented.steps.values()].count("real")
    assert found["same"] in (0, 1)  # as torch's order is on this machine
    assert found["other"] == 0


@torch.no_grad()
def test_a_network_whose_first_layer_gets_other_weights(way):
    network = biper.create_model("resnet20_1w1a", stage=2).eval()
    packed, images = biper.pack(network), torch.randn(2, 3, 32, 32)
    packed(images)
    for model in (network, packed.network):
        model.get_parameter("conv1.weight").mul_(-1)
    assert torch.equal(packed(images), network(images))


@torch.no_grad()
def test_weights_that_were_moved_and_moved_back(way):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    for _ in range(20):  # new values may come to lie where the old ones did
        layer = BinaryConv2d(16, 16, 3, weight_quantizer=SquareWave(20.0))
        packed = biper.pack(nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.Tanh(), layer).eval())
        packed(x)
        packed.half().float()
        assert torch.equal(packed(x), packed.network(x))


@torch.no_grad()
def test_a_layer_of_single_taps_that_torch_adds_up_in_chunks(way, monkeypatch):
    order = SumOrder(chunk=16)
    layers = nn.Conv2d(40, 16, 1, bias=False), BinaryConv2d(16, 16, 3, weight_quantizer=SquareWave(20.0))
    packed, images = biper.pack(nn.Sequential(*layers).eval()), torch.randn(2, 40, 9, 9)
    (conv,) = [module for module in packed.modules() if isinstance(module, nn.Conv2d)]
    monkeypatch.setattr(conv, "forward", lambda x: summed(x, conv, order))
    assert torch.equal(packed(images), packed.network(images))
    (segmented,) = packed._forwards.values()
    assert order in [step.order for step in segmented.steps.values() if step.kind == "real"]


def test_sums_of_many_products_are_left_to_torch():
    small = {(size, channels): packed_compile._is_small(nn.Conv2d(channels, 8, size, bias=False)) for size, channels in
             itertools.product((1, 3, (2, 8)), (3, 16, 28, 29, 256, 257))}  # fmt: skip
    assert small == {(size, channels): channels * {1: 1, 3: 9}.get(size, 16) <= 256 for size, channels in small}
