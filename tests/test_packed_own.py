"""Packing networks of somebody's own, and what torch may be told around them."""

import logging
import warnings
import weakref

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import biper
from benchmarks.variants import randomized
from biper.nn.comparison_quantizers import RSign
from biper.nn.quantizers import SquareWave
from biper.packed import runtime as kernels
from biper.packed.layers import PackedConv2d
from biper.packed.lowering import Segment
from biper.packed.onnx import export_onnx, float_network
from biper.packed.pack import pack

WAYS = kernels.available()


@torch.no_grad()
def test_whatever_torchs_defaults_are():
    model = randomized(biper.create_model("resnet20_1w1a", stage=2)).eval()
    x = torch.randn(3, 3, 12, 12)
    expected, packed = model(x), pack(model)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(packed(x), expected)
        with torch.device("meta"):
            assert torch.equal(pack(model)(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def test_wrong_channels_and_sizes_are_refused():
    packed = pack(nn.Sequential(biper.BinaryConv2d(8, 16, 3, weight_quantizer=SquareWave(20.0))))
    for shape in ((2, 4, 6, 6), (2, 16, 6, 6), (2, 8, 2, 2), (8, 6, 6)):
        with pytest.raises((ValueError, RuntimeError), match=r"expected|smaller"):
            packed(torch.randn(shape))


class Coupled(nn.Module):
    """Looks at its batch as a whole, views its activations, and uses one layer twice, once in place."""

    def __init__(self):
        super().__init__()
        self.a = self.b = biper.BinaryConv2d(8, 8, 3, padding=1, weight_quantizer=SquareWave(20.0))

    def forward(self, x):
        y = self.a(x)
        x = F.relu(x - x.mean(0), True)
        return self.b(y + x).view(x.size(0), -1)


@torch.no_grad()
def test_batches_that_belong_together():
    own, x = Coupled().eval(), torch.randn(40, 8, 6, 6)
    packed = pack(own)
    assert isinstance(packed.network.b, PackedConv2d)
    assert torch.equal(packed(x), own(x))
    twice = nn.Sequential(nn.BatchNorm2d(8, track_running_stats=False), own.a).eval()
    torch.testing.assert_close(pack(twice)(x), twice(x))


@torch.no_grad()
def test_a_layer_alone_and_layers_of_ones_own():
    class Named(biper.BinaryConv2d):
        pass

    class Changed(biper.BinaryConv2d):
        def forward(self, a):
            return super().forward(a) + 1

    x = torch.randn(2, 8, 6, 6)
    for layer in (
        biper.BinaryConv2d(8, 16, 3, weight_quantizer=SquareWave(20.0)),
        nn.Sequential(
            Named(8, 4, 1, weight_quantizer=SquareWave(20.0)), Changed(4, 8, 1, weight_quantizer=SquareWave(20.0))
        ),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the changed one, which stays real
            packed = pack(layer.eval())
        assert any(isinstance(m, PackedConv2d) for m in packed.modules())
        assert torch.equal(packed(x), layer(x))


@torch.no_grad()
def test_under_autocast_and_in_training_mode():
    torch.manual_seed(0)
    own, x = Own().eval(), torch.randn(4, 3, 24, 20)
    packed = pack(own)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x).isfinite().all()
    torch.testing.assert_close(packed.train()(x), packed.eval()(x), rtol=1e-5, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in packed.parameters())


class Headed(nn.Module):
    """Asks for the sides of its activations, and for the number of its images."""

    def __init__(self, mean):
        super().__init__()
        self.conv = biper.BinaryConv2d(8, 24, 3, padding=1, weight_quantizer=SquareWave(20.0))
        self.mean, self.norm, self.linear = mean, nn.BatchNorm1d(24), nn.Linear(24, 5)

    def forward(self, x):
        return self.linear(self.norm(self.mean(self.conv(x))))


HEADS = {
    "shape": lambda y: F.avg_pool2d(y, y.shape[2:]).flatten(1),
    "sizes": lambda y: torch.flatten(F.avg_pool2d(y, (y.size()[2], y.size(-1))), 1),
    "batch": lambda y: F.avg_pool2d(y, y.shape[-2:]).view(y.shape[0], -1),
    "both": lambda y: F.avg_pool2d(y, 6).reshape(y.size()[:2]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_means_over_whole_images_and_norms_behind_them(way, head, monkeypatch):
    monkeypatch.setenv(kernels.CHOICE, way)
    own = randomized(Headed(HEADS[head])).eval()
    packed = pack(own)
    for images in (1, 3, 7):
        x = torch.randn(images, 8, 6, 6)
        assert torch.equal(packed(x), own(x))
    for segmented in packed._forwards.values():
        called = {node.target for node in segmented.graph.nodes if node.op == "call_module"}
        assert head in ("batch", "both") or called == {"segment0", "linear1"}


class Twice(Headed):
    def forward(self, x):
        y = self.mean(self.conv(x))
        return self.norm(y) + y


@torch.no_grad()
def test_what_is_flattened_may_be_read_twice(caplog):
    own, x = randomized(Twice(HEADS["shape"])).eval(), torch.randn(3, 8, 6, 6)
    assert torch.equal(pack(own)(x), own(x))
    assert "slower" not in caplog.text


class Counting(nn.Module):
    """Works with the number of its images where that is not the first of a tensor's sizes."""

    def __init__(self, means):
        super().__init__()
        self.conv, self.means = biper.BinaryConv2d(8, 24, 3, padding=1, weight_quantizer=SquareWave(20.0)), means

    def forward(self, x):
        return self.means(self.conv(x))


def turned(y):
    t = y.flatten(2).permute(2, 0, 1)
    return t.sum(0) / t.size(1)


@pytest.mark.parametrize("means", [turned, lambda y: F.hardtanh(y).reshape(y.size(0), y.shape[1:].numel())])
@torch.no_grad()
def test_sizes_that_are_no_sides_of_images(means):
    own = randomized(Counting(means)).eval()
    packed = pack(own)
    for images in (3, 1, 5):
        x = torch.randn(images, 8, 6, 6)
        torch.testing.assert_close(packed(x), own(x))


@torch.no_grad()
def test_threads_may_meet_while_one_makes_the_weights_anew(monkeypatch):
    """What a run reads lives until its end, though another thread has other weights made meanwhile."""
    packed = pack(nn.Sequential(biper.BinaryConv2d(8, 24, 3, padding=1, weight_quantizer=SquareWave(20.0))))
    x = torch.randn(2, 8, 6, 6)
    expected, alive = packed(x), []

    def run(code, addresses, images, path, known=kernels.run):
        for module in packed.modules():
            if isinstance(module, PackedConv2d):
                module.bits = module.bits.clone()
        kept = [weakref.ref(t) for segmented in packed._forwards.values() for t in made_of(segmented)]
        with monkeypatch.context() as inner:
            inner.setattr(kernels, "run", known)
            assert torch.equal(packed(x), expected)
        alive.extend(ref() is not None for ref in kept)
        known(code, addresses, images, path)

    monkeypatch.setattr(kernels, "run", run)
    assert kernels.chosen() == kernels.TORCH or torch.equal(packed(x), expected)
    assert all(alive)
    assert alive or kernels.chosen() == kernels.TORCH


def made_of(segmented):
    """The tensors that a network's segments hold as arranged."""
    return [t for m in segmented.owner.modules() if isinstance(m, Segment) for t in m.compiled._last.made]


class Own(nn.Module):
    """A network of somebody's own: groups that end within a byte, pooling, a mean, channels that are added."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 18, 3, padding=1)
        self.norm0, self.norm1, self.norm2 = nn.BatchNorm2d(18), nn.BatchNorm2d(30), nn.BatchNorm2d(30)
        self.conv1 = biper.BinaryConv2d(18, 30, 3, padding=1, groups=3, weight_quantizer=SquareWave(20.0))
        self.conv2 = biper.BinaryConv2d(30, 30, 3, padding=1, groups=3, weight_quantizer=SquareWave(20.0))
        self.conv3 = biper.BinaryConv2d(40, 8, 1, stride=2, weight_quantizer=SquareWave(20.0))
        self.conv4, self.norm4 = biper.BinaryConv2d(18, 30, 1, weight_quantizer=SquareWave(20.0)), nn.BatchNorm2d(30)

    def forward(self, x):
        x = F.max_pool2d(F.hardtanh(self.norm0(self.stem(x))), 3, 2, 1)
        x = F.hardtanh(self.norm1(self.conv1(x)) + self.norm4(self.conv4(x)))  # two branches that end in one sum
        y = F.max_pool2d(self.conv2(x), 2)
        y = self.norm2(y) + F.avg_pool2d(x, 2)
        y = torch.relu(y) - 0.5
        return self.conv3(F.pad(y, (0, 0, 0, 0, 4, 6))).mean((2, 3))


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_networks_of_ones_own(way, monkeypatch):
    monkeypatch.setenv(kernels.CHOICE, way)
    torch.manual_seed(0)
    own, x = Own().eval(), torch.randn(4, 3, 24, 20)
    packed = pack(own)
    torch.testing.assert_close(packed(x), own(x), rtol=1e-5, atol=1e-4)
    assert packed.metadata is None


class Named(nn.Module):
    """Functions and layers that are called with their arguments' names."""

    def __init__(self):
        super().__init__()
        self.conv1 = biper.BinaryConv2d(3, 16, 3, padding=1, weight_quantizer=SquareWave(20.0))
        self.conv2 = biper.BinaryConv2d(16, 16, 3, padding=1, weight_quantizer=SquareWave(20.0))
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(32, 5)

    def forward(self, x):
        x = F.hardtanh(input=self.norm(self.conv1(x)))
        x = torch.add(input=self.norm(input=self.conv2(input=torch.neg(input=x))), other=x)
        x = F.avg_pool2d(input=torch.cat(tensors=[x, x], dim=1), kernel_size=2)
        return self.head(input=torch.flatten(input=F.adaptive_avg_pool2d(input=x, output_size=1), start_dim=1))


@torch.no_grad()
def test_arguments_may_have_names(caplog):
    torch.manual_seed(0)
    own, x = Named().eval(), torch.randn(2, 3, 9, 8)
    packed = pack(own)
    torch.testing.assert_close(packed(x), own(x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(packed.network(x), own(x), rtol=1e-5, atol=1e-4)  # layer by layer
    assert "slower" not in caplog.text


class Exact(nn.Module):
    """Binary convolutions alone: biases before a maximum, a norm, a sum and a sign; dilated and depth-wise ones."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(20), nn.BatchNorm2d(32)
        self.conv1 = biper.BinaryConv2d(3, 20, 3, padding=1, bias=True, weight_quantizer=SquareWave(20.0))
        self.conv2 = biper.BinaryConv2d(20, 32, 3, padding=2, dilation=2, bias=True, weight_quantizer=SquareWave(20.0))
        self.conv3 = biper.BinaryConv2d(32, 32, 3, padding=1, groups=2, bias=True, weight_quantizer=SquareWave(20.0))
        self.conv4 = biper.BinaryConv2d(32, 7, 1, weight_quantizer=SquareWave(20.0))
        self.depthwise = biper.BinaryConv2d(
            32, 32, 3, padding=(1, 3), dilation=(1, 3), groups=32, bias=True, weight_quantizer=SquareWave(20.0)
        )

    def forward(self, x):
        x = F.hardtanh(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        x = F.hardtanh(self.norm2(self.conv2(x)))
        x = self.conv3(x) + x
        x = self.norm2(self.depthwise(x)) + x
        return self.conv4(self.conv3(x))


def exact():
    network = randomized(Exact())
    for module in network.modules():
        if isinstance(module, biper.BinaryConv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
    return network


@torch.no_grad()
def test_onnx_has_the_same_layers(tmp_path):
    torch.manual_seed(0)
    own, x = exact(), torch.randn(3, 3, 12, 12)
    assert torch.equal(float_network(pack(own))(x), own(x))
    # alone: further signs would turn where the other runtime rounds in another place
    alone = nn.Sequential(
        biper.BinaryConv2d(3, 6, 3, dilation=2, groups=3, bias=True, weight_quantizer=SquareWave(20.0))
    ).eval()
    loud = logging.getLogger("torch.onnx")
    level = loud.level
    export_onnx(pack(alone), tmp_path / "net.onnx", 12)
    assert loud.level == level  # quiet for that time alone
    (found,) = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), alone(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.no_grad()
def test_biased_dilated_and_depthwise_layers_round_as_torchs(way, threads, monkeypatch):
    monkeypatch.setenv(kernels.CHOICE, way)
    torch.set_num_threads(threads)
    for seed in range(5):
        torch.manual_seed(seed)
        own = exact()
        packed = pack(own)
        for shape in ((1, 3, 12, 9), (5, 3, 9, 12)):
            x = torch.randn(shape)
            assert torch.equal(packed(x), own(x))


@torch.no_grad()
def test_images_that_the_network_cannot_take_are_not_called_slow(caplog):
    with pytest.raises(ValueError, match="expected"):
        pack(exact())(torch.randn(1, 5, 12, 10))
    assert "layer by layer" not in caplog.text


@torch.no_grad()
def test_what_decides_a_bit_may_change_in_place():
    packed, x = pack(exact()), torch.randn(3, 3, 12, 10)
    packed(x)
    for module in packed.modules():
        for name, tensor in module.named_buffers(recurse=False):
            if name in ("alpha", "bias", "gain", "shift"):
                before = packed(x)
                tensor.mul_(-1.5)
                assert torch.equal(packed(x), packed._layer_by_layer(x)), name
                assert not torch.equal(packed(x), before), name


@torch.no_grad()
def test_a_learned_threshold_decides_a_bit():
    torch.manual_seed(0)
    learned = {"weight_quantizer": SquareWave(20.0), "input_quantizer": RSign()}
    layers = [biper.BinaryConv2d(8, 20, 3, padding=1, weight_quantizer=SquareWave(20.0)), nn.BatchNorm2d(20)]
    network = randomized(nn.Sequential(*layers, nn.Hardtanh(), biper.BinaryConv2d(20, 8, 3, padding=1, **learned)))
    nn.init.normal_(network[3].input_quantizer.threshold, 0, 0.3)
    packed, x = pack(network.eval()), torch.randn(3, 8, 12, 10)
    for _ in range(2):
        assert torch.equal(packed(x), packed._layer_by_layer(x))
        packed.network[3].threshold.neg_()


def test_what_decides_a_bit_is_made_ready_once(monkeypatch):
    with torch.inference_mode():
        network, x = exact(), torch.randn(3, 3, 12, 10)
        packed = pack(network)
        expected = packed(x)
        monkeypatch.setattr(kernels, "limits", lambda *_: pytest.fail("they are there already"))
        assert torch.equal(packed(x), expected)


@torch.no_grad()
def test_a_network_that_cannot_be_traced_runs_layer_by_layer(caplog):
    class Choosing(Own):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    torch.manual_seed(0)
    own, x = Choosing().eval(), torch.randn(4, 3, 24, 20)
    packed = pack(own)
    torch.testing.assert_close(packed(x), own(x), rtol=1e-5, atol=1e-4)
    assert WAYS == (kernels.TORCH,) or ("layer by layer" in caplog.text and "layer by layer" in packed.describe())


@torch.no_grad()
@pytest.mark.parametrize("change", ["gain", "threshold", "weight"])
def test_a_parameter_of_another_length_is_refused_and_not_read_past_its_end(change):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.PReLU(16),
        biper.BinaryConv2d(16, 16, 3, weight_quantizer=biper.Sign(), input_quantizer=biper.RSign()),
        nn.BatchNorm2d(16),
        biper.BinaryConv2d(16, 16, 3, weight_quantizer=biper.Sign()),
    )
    packed, x = biper.pack(model.eval()), torch.randn(2, 3, 9, 9)
    packed(x)
    if change == "gain":
        packed.network[3].gain = torch.ones(1)
    elif change == "threshold":
        packed.network[2].threshold = torch.zeros(1, 1, 1)
    else:
        packed.network[1].weight = nn.Parameter(torch.zeros(15))
    with pytest.raises(RuntimeError, match="a packed network reads 16 numbers of a parameter that has 1"):
        packed(x)


@torch.no_grad()
def test_those_who_replace_what_torch_computes_see_a_packed_network():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), biper.BinaryConv2d(16, 16, 3, weight_quantizer=biper.Sign()))
    packed, x = biper.pack(model.eval()), torch.randn(2, 3, 9, 9)
    expected = packed(x)
    torch.testing.assert_close(make_fx(packed)(x)(x), expected, rtol=0, atol=1e-4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert packed(mode.from_tensor(x)).shape == expected.shape
