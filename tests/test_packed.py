"""Whole packed networks: equal to the training ones on every way to count bits, and modules like any other."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import biper
from biper.errors import UsageError
from biper.nn.activations import RPReLU
from biper.packed import compile as packed_compile
from biper.packed import runtime as kernels
from biper.packed.compile import Segmented, traced
from biper.packed.layers import PackedConv2d
from biper.packed.lowering import Segment
from biper.packed.network import KEPT
from biper.packed.pack import pack

WAYS = kernels.available()
NAMES = [(family, n) for family in ("cifar10", "imagenet") for n in biper.list_models(family) if n.endswith("_1w1a")]


@torch.no_grad()
def trained(model, seed=0):
    """The model as training leaves it: no parameter or statistic is a round number."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(1, 20, generator=generator)
            module.weight.normal_(generator=generator)
            module.bias.normal_(0, 0.3, generator=generator)
        elif isinstance(module, biper.BinaryConv2d):
            module.alpha.normal_(generator=generator)
        elif isinstance(module, nn.PReLU | RPReLU):
            module.weight.uniform_(-0.5, 1.5, generator=generator)
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] in ("threshold", "before", "after"):
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def network(name="resnet20_1w1a", family="cifar10", seed=0):
    """A network of stage 2."""
    torch.manual_seed(seed)
    return trained(biper.create_model(name, family=family, num_classes=10, freq=20.0, stage=2), seed)


@pytest.mark.parametrize(("family", "name"), NAMES)
@torch.no_grad()
def test_logits_and_predictions_equal_the_training_networks(family, name, monkeypatch):
    model = network(name, family)
    packed = pack(model)
    for size, batch, threads in ((32, 1, 2), (32, 5, 3)):
        torch.set_num_threads(threads)
        x = torch.randn(batch, 3, size, size)
        expected = model(x)
        for way in WAYS:
            monkeypatch.setenv(kernels.CHOICE, way)
            found = packed(x)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4, msg=lambda text, way=way: f"{way}: {text}")
            assert torch.equal(found.argmax(1), expected.argmax(1)), way


@pytest.mark.skipif(WAYS == (kernels.TORCH,), reason="needs the compiled instructions")
@pytest.mark.parametrize(
    ("family", "name", "segments"),
    [
        ("cifar10", "resnet18_1w1a", 1),
        ("imagenet", "resnet18_1w1a", 4),
        ("cifar10", "resnet20_react_1w1a", 1),
        ("imagenet", "mobilenet_react_1w1a", 1),
    ],
)
@torch.no_grad()
def test_everything_between_real_layers_is_one_segment(family, name, segments, monkeypatch):
    """Where torch runs those, as where their sums are not its own."""
    monkeypatch.setattr(packed_compile, "real_convolution", lambda step, x: x.new_empty(0))
    packed = pack(network(name, family))
    cut = Segmented(packed.network, traced(packed.network), torch.zeros(2, 3, 64, 64))
    assert sum(isinstance(m, Segment) for m in cut.owner.modules()) == segments


@pytest.mark.skipif(WAYS == (kernels.TORCH,), reason="needs the compiled instructions")
@torch.no_grad()
def test_the_last_shapes_are_kept_and_threads_may_differ_in_them():
    packed = pack(network("resnet20_1w1a"))
    batches = [torch.randn(2, 3, 8 + i, 8) for i in range(KEPT + 3)]
    expected = [packed(x) for x in batches]
    assert [key[0][1] for key in packed._forwards] == list(range(8 + 3, 8 + KEPT + 3))
    key = next(key for key in packed._forwards if key[0] == batches[3].shape[1:])
    first = packed._forwards[key]
    packed(batches[3])  # of those that are kept the one that was used longest ago, and now the last
    packed(batches[0])
    assert packed._forwards[key] is first
    assert len(packed._forwards) == KEPT

    def mine(shift):
        with torch.no_grad():
            return [packed(x) for x in batches[shift:] + batches[:shift]]  # some are made anew, beside other threads

    with ThreadPoolExecutor(4) as pool:
        for shift, results in enumerate(pool.map(mine, range(4))):
            assert all(map(torch.equal, results, expected[shift:] + expected[:shift]))
    assert len(packed._forwards) == KEPT


@torch.no_grad()
def test_odd_sizes_and_many_images():
    model = network("resnet18A_1w1a")
    packed = pack(model)
    for shape in ((2, 3, 23, 17), (70, 3, 9, 9)):
        x = torch.randn(shape)
        torch.testing.assert_close(packed(x), model(x), rtol=0, atol=1e-4)


@torch.no_grad()
def test_large_batches_go_in_parts(monkeypatch):
    monkeypatch.setattr("biper.packed.network.CHUNK", 1)
    model, x = network(), torch.randn(33, 3, 16, 16)
    torch.testing.assert_close(pack(model)(x), model(x), rtol=0, atol=1e-4)


@torch.no_grad()
def test_it_is_exported_compiled_copied_and_pickled():
    model, x = network(), torch.randn(3, 3, 16, 16)
    packed = pack(model)
    expected = packed(x)
    exported = torch.export.export(packed, (x,)).module()
    compiled = torch.compile(packed, backend="aot_eager")
    for other in (exported, compiled, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_changes_of_a_packed_network_count():
    packed, x = pack(network()), torch.randn(2, 3, 16, 16)
    before = packed(x)
    other = pack(network(seed=1))
    packed.load_state_dict(other.state_dict())
    assert torch.equal(packed(x), other(x))
    assert not torch.equal(packed(x), before)
    seen = []
    packed.network.layer1[0].conv1.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(packed(x), other(x), rtol=0, atol=1e-4)
    assert seen
    assert packed.double()(x.double()).dtype == torch.float64
    with pytest.raises(UsageError):  # and not wrong figures: its parameters are double now
        packed(x)


@torch.no_grad()
def test_what_it_holds():
    model = network()
    packed = pack(model)
    assert packed.metadata == model.metadata
    assert not list(packed.network.layer1.parameters())
    assert not packed.training
    assert isinstance(packed.network.layer1[0].conv1, PackedConv2d)
    assert isinstance(model.layer1[0].conv1, biper.BinaryConv2d)  # the given one is left alone


@pytest.mark.parametrize(
    ("name", "stage", "message"),
    [("resnet20_1w1a", 1, "are real, as in stage 1"), ("resnet20_32w32a", 1, "no binary layers")],
)
def test_what_cannot_be_packed(name, stage, message):
    with pytest.raises(UsageError, match=message):
        pack(biper.create_model(name, stage=stage))


def test_images_of_a_wrong_size_are_refused_in_one_line():
    with pytest.raises(UsageError, match=r"^vgg_small takes 32x32 images, not 16x16"):
        pack(network("vgg_small_1w1a"))(torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), r"torch\.float32: not torch\.uint8 \(2, 3, 16, 16\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.float64), r"not torch\.float64"),
        (torch.zeros(3, 16, 16), r"\(3, 16, 16\)"),
        (torch.zeros(2, 1, 16, 16), r"\(2, 1, 16, 16\)"),
        ([[0.0]], "a tensor of images, not a list"),
    ],
)
def test_other_inputs_are_refused_in_one_line(images, text):
    with pytest.raises(UsageError, match=f"^resnet20_1w1a takes .*{text}"):
        pack(network())(images)


@torch.no_grad()
def test_binary_weights_alone_can_be_packed():
    model, x = network("resnet20_1w32a"), torch.randn(2, 3, 16, 16)
    expected = model(x)
    torch.testing.assert_close(pack(model)(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_gradients_of_images_are_refused_and_not_wrong():
    with pytest.raises(RuntimeError):
        pack(network())(torch.randn(2, 3, 16, 16, requires_grad=True)).sum().backward()


@pytest.mark.skipif(WAYS == (kernels.TORCH,), reason="needs the compiled instructions")
def test_without_the_compiled_instructions_torch_does_the_work(monkeypatch, caplog):
    monkeypatch.setattr("biper.packed.runtime.HERE", kernels.HERE / "nowhere")
    for cached in (kernels.built, kernels.compiled, kernels.available):
        cached.cache_clear()
    try:
        assert kernels.available() == (kernels.TORCH,)
        model, x = network(), torch.randn(2, 3, 16, 16)
        packed = pack(model)
        with torch.no_grad():
            torch.testing.assert_close(packed(x), model(x), rtol=0, atol=1e-4)
            packed(x)
        assert caplog.text.count("plain torch operations, which is slower") == 1
    finally:
        for cached in (kernels.built, kernels.compiled, kernels.available):
            cached.cache_clear()
