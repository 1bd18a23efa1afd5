"""The weights that the compiled instructions read follow the bits of which they were made."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from biper.models.registry import create_model
from biper.packed import arrange, runtime
from biper.packed.layers import PackedConv2d, PackedLinear
from biper.packed.pack import pack

pytestmark = pytest.mark.skipif(runtime.available() == ("torch",), reason="there are no compiled instructions")
ALL = -1  # every bit of a word


def layer(channels=64):
    torch.manual_seed(0)
    packed = PackedConv2d(nn.Conv2d(channels, 16, 3, padding=1, bias=False))
    packed.bits = torch.randint(-(2**62), 2**62, packed.bits.shape)
    return packed


def test_values_that_are_written_into_bits_count():
    packed, x = layer(), torch.randn(2, 64, 6, 7)
    before = packed(x)
    packed.bits.bitwise_xor_(torch.tensor(ALL))
    assert torch.equal(packed(x), -before)
    packed.bits.data = packed.bits.bitwise_not()
    assert torch.equal(packed(x), before)
    packed.bits = packed.bits.bitwise_not()
    assert torch.equal(packed(x), -before)
    with torch.inference_mode():  # here torch counts no versions
        copied = packed.bits.clone()
        packed.bits = copied
        copied.bitwise_xor_(torch.tensor(ALL))
        assert torch.equal(packed(x), before)
        copied.bitwise_xor_(torch.tensor(ALL))
        assert torch.equal(packed(x), -before)


def test_images_of_all_sizes_share_the_weights_which_go_with_the_bits():
    packed, made = layer(), []
    for size in (5, 6, 7):
        packed(torch.randn(1, 64, size, size))
        made.append(weakref.ref(arrange._WEIGHTS[3, 24].of(packed.bits, lambda: pytest.fail("they are there already"))))
    assert made[0]() is made[2]() is not None
    del packed
    gc.collect()
    assert made[0]() is None


def test_a_layer_goes_from_one_way_of_counting_to_another(monkeypatch):
    packed, x = layer(), torch.randn(2, 64, 6, 7)
    expected = F.conv2d(torch.where(x >= 0, 1.0, -1.0), packed.binary_weight(), padding=1)
    for way in (*runtime.available(), *runtime.available()):
        monkeypatch.setenv(runtime.CHOICE, way)
        assert torch.equal(packed(x), expected)


@pytest.mark.parametrize("way", runtime.available())
@pytest.mark.parametrize("inputs", [4_100 * 8, 65_312])
def test_rows_are_as_long_as_they_like(monkeypatch, way, inputs):
    """Numbers of 8 and of 16 bits on the way to their sums must not overflow."""
    monkeypatch.setenv(runtime.CHOICE, way)
    packed, x = PackedLinear(inputs, 17, bias=False), torch.stack((torch.ones(inputs), -torch.ones(inputs)))
    x[:, 7::10] *= -1
    packed.bits[..., 1] = ALL  # and all other weights are -1
    total = inputs - 2 * len(x[0, 7::10])
    assert packed(x)[:, :3].tolist() == [[-total, total, -total], [total, -total, total]]
    assert packed(torch.ones(1, inputs))[0, :2].tolist() == [-inputs, inputs]


def test_nibbles_are_those_of_the_words():
    words = torch.tensor([0x12345678, 0x12345678 ^ 0x0F], dtype=torch.int32).view(1, 2, 1).expand(1, 2, 16)
    found = arrange.nibbles(words.contiguous())
    assert found[0, 0, :, :, 5].tolist() == [[8, 7], [6, 5], [4, 3], [2, 1]]
    assert found[0, 1, :, :, 5].tolist() == [[15, 0], [0, 0], [0, 0], [0, 0]]


def test_the_same_bits_may_be_those_of_other_windows():
    bits, x = layer(8).bits, torch.randn(2, 8, 12, 12)
    for kernel in ((3, 3), (1, 9), (9, 1), (3, 3)):
        packed = PackedConv2d(nn.Conv2d(8, 16, kernel, bias=False))
        packed.bits = bits
        assert torch.equal(packed(x), F.conv2d(torch.where(x >= 0, 1.0, -1.0), packed.binary_weight()))


def test_a_network_made_in_inference_mode_arranges_its_weights_once(monkeypatch):
    torch.manual_seed(0)
    network = create_model("resnet20_1w1a", family="cifar10", stage=2).eval()
    with torch.inference_mode():
        packed, x = pack(network), torch.randn(2, 3, 32, 32)
        expected, other = network(x), copy.deepcopy(packed)
        assert torch.equal(packed(x), expected)
        assert torch.equal(other(x), expected)
        monkeypatch.setattr(runtime, "offsets", lambda *_: pytest.fail("they are there already"))
        assert torch.equal(packed(x), expected)
        assert torch.equal(other(x), expected)


def test_threads_that_come_first_together_get_the_same():
    packed, x, found = layer(), torch.randn(2, 64, 6, 7), []
    threads = [threading.Thread(target=lambda: found.append(packed(x))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(out, packed(x)) for out in found)
