"""Packed networks with every quantizer and activation: equal to the training ones to the last bit."""

import json

import onnxruntime
import pytest
import torch
from test_packed import trained
from test_packed_file import reworked
from torch import nn

import biper
from biper.errors import UsageError
from biper.nn.activations import ACTIVATIONS, RPReLU
from biper.nn.comparison_quantizers import XNOR, RSign
from biper.nn.quantizers import INPUT_QUANTIZERS, WEIGHT_QUANTIZERS, InputQuantizer, Periodic, SquareWave
from biper.packed import runtime as kernels
from biper.packed.costs import costs
from biper.packed.file import load_packed, save_packed
from biper.packed.layers import PackedConv2d, PackedLinear
from biper.packed.onnx import export_onnx
from biper.packed.pack import pack

WAYS = kernels.available()
OURS = "biper."  # other tests register quantizers of their own
WEIGHTS = [kind for kind in WEIGHT_QUANTIZERS.values() if kind.__module__.startswith(OURS) and kind.binary]
INPUTS = [kind for kind in INPUT_QUANTIZERS.values() if kind.__module__.startswith(OURS)]
ONE_SIDED = pytest.mark.filterwarnings("ignore:all activations are")  # behind a ReLU they are


def with_quantizers(weights, inputs, activation, name="resnet20_1w1a"):
    quantizer = weights(20.0) if issubclass(weights, Periodic) else weights()
    how = {"weight_quantizer": quantizer, "input_quantizer": inputs(), "activation": activation}
    return trained(biper.create_model(name, **how))


@ONE_SIDED
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_logits_equal_the_training_networks_bit_for_bit(weights, inputs, activation, monkeypatch):
    model = with_quantizers(weights, inputs, activation)
    packed = pack(model)
    for shape in ((1, 3, 9, 8), (5, 3, 8, 9)):
        x = torch.randn(shape)
        expected = model(x)
        for way in WAYS:
            monkeypatch.setenv(kernels.CHOICE, way)
            assert torch.equal(packed(x), expected), (way, shape)


@pytest.mark.parametrize(("name", "size"), [("resnet18_react_1w1a", 32), ("mobilenet_1w1a", 96)])
@torch.no_grad()
def test_real_layers_of_single_pixels_and_means_add_up_in_the_same_order(name, size):
    model, x = trained(biper.create_model(name, family="imagenet", stage=2)), torch.randn(5, 3, size, size)
    assert torch.equal(pack(model)(x), model(x))


@ONE_SIDED
@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_files_say_which_quantizers_and_activation(activation, tmp_path):
    path, x = tmp_path / "net.safetensors", torch.randn(2, 3, 8, 8)
    model = with_quantizers(XNOR, RSign, activation)
    save_packed(pack(model), path)
    loaded = load_packed(path)
    assert loaded.metadata == model.metadata
    assert torch.equal(loaded(x), model(x))
    without = pack(with_quantizers(XNOR, biper.Sign, activation))
    without.metadata = model.metadata
    with pytest.raises(UsageError, match=r"threshold is missing"):
        save_packed(without, path)
    tensors = {name.rsplit(".", 1)[-1] for name in loaded.network.state_dict()}
    assert ("before" in tensors) == (activation == "rprelu")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"activation": "gelu"}, "unknown activation 'gelu'"),
        ({"activation": "prelu"}, "does not fit"),
        ({"input_quantizer": {"name": "polynomial_sign", "standardized": True}}, r"does not fit .*threshold"),
        ({"input_quantizer": {"name": "rsign", "more": 1}}, "has no setting 'more'; its settings are none"),
        ({"input_quantizer": "rsign"}, "its input_quantizer is 'rsign', not"),
        ({"weight_quantizer": {"name": "recu", "tau_min": 2.0}}, "ReCU takes"),
        ({"weight_quantizer": {}}, "its weight_quantizer is {}, not"),
    ],
)
def test_facts_that_are_wrong(facts, message, tmp_path):
    path = tmp_path / "net.safetensors"
    save_packed(pack(with_quantizers(XNOR, RSign, "rprelu")), path)
    with pytest.raises(UsageError, match=message):
        load_packed(reworked(path, lambda tensors: None, **facts))


def test_bipers_files_are_what_they_were(tmp_path):
    path = tmp_path / "net.safetensors"
    save_packed(pack(biper.create_model("resnet20_1w1a", stage=2)), path)
    contents = path.read_bytes()
    header = json.loads(contents[8 : 8 + int.from_bytes(contents[:8], "little")])
    facts = json.loads(header.pop("__metadata__")["biper"])
    assert facts["format"] == 1
    assert not {"activation", "weight_quantizer", "input_quantizer"} & set(facts)
    assert {name.rsplit(".", 1)[-1] for name in header} >= {"bits", "alpha", "gain", "shift"}
    assert not any("threshold" in name for name in header)


@torch.no_grad()
def test_onnx_has_thresholds_and_slopes(tmp_path):
    how = {"padding": 1, "weight_quantizer": XNOR(), "input_quantizer": RSign()}
    layers = [biper.BinaryConv2d(3, 24, 3, **how), RPReLU(24), nn.BatchNorm2d(24), biper.BinaryConv2d(24, 8, 3, **how)]
    model, x = (
        trained(nn.Sequential(*layers, nn.PReLU(8), nn.Flatten(), nn.Linear(8 * 64, 10))),
        torch.randn(3, 3, 8, 8),
    )
    export_onnx(pack(model), tmp_path / "net.onnx", 8)
    (found,) = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {"images": x.numpy()})
    assert torch.equal(torch.from_numpy(found).argmax(1), model(x).argmax(1))


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_thresholds_at_their_edges(way, monkeypatch):
    monkeypatch.setenv(kernels.CHOICE, way)
    edges = torch.tensor([0.0, -0.0, 0.1, -0.1, 2.0**-149, float("inf"), -float("inf"), float("nan")])
    how = {"weight_quantizer": SquareWave(20.0), "input_quantizer": RSign()}
    conv = biper.BinaryConv2d(len(edges), 20, 3, padding=1, groups=2, **how).eval()
    conv.input_quantizer.threshold.copy_(edges[:, None, None])
    linear = biper.BinaryLinear(len(edges), 5, **how).eval()
    linear.input_quantizer.threshold.copy_(edges)
    for value in (*edges, *torch.nextafter(edges, torch.tensor(1.0)), *torch.nextafter(edges, torch.tensor(-1.0))):
        x = torch.full((2, len(edges), 3, 2), value.item())
        assert torch.equal(PackedConv2d.of(conv)(x), conv(x)), value
        assert torch.equal(PackedLinear.of(linear)(x[..., 0, 0]), linear(x[..., 0, 0])), value


class Branching(nn.Module):
    """Convolutions with thresholds of their own on one value, on what is given, and behind a maximum."""

    def __init__(self, channels=24):
        super().__init__()
        inputs = [RSign(), RSign(), RSign(), biper.Sign(), biper.Sign(), RSign()]
        self.convs = nn.ModuleList(
            biper.BinaryConv2d(channels, channels, 3, padding=1, bias=True, weight_quantizer=XNOR(), input_quantizer=q)
            for q in inputs
        )
        self.norm, self.pool = nn.BatchNorm2d(channels), nn.MaxPool2d(2, padding=1)
        self.activations = nn.ModuleList([RPReLU(channels), nn.PReLU(channels), nn.PReLU(1)])

    def forward(self, x):
        x = self.convs[0](x) + self.convs[1](x) + x
        x = self.pool(self.activations[0](self.norm(x)))
        y = self.activations[1](self.convs[2](x) + self.convs[3](x))
        return self.convs[5](self.activations[2](self.convs[4](x) + y))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("channels", [24, 32])
@torch.no_grad()
def test_thresholds_of_several_readers(channels, way, monkeypatch):
    monkeypatch.setenv(kernels.CHOICE, way)
    model = trained(Branching(channels))
    packed = pack(model)
    for shape in ((1, channels, 7, 6), (4, channels, 6, 7)):
        x = torch.randn(shape)
        x[:, :, 0] = model.convs[1].input_quantizer.threshold[:, 0]
        x[0, :, 3, 3] = float("nan")
        assert torch.equal(packed(x), model(x))


class OneForAll(InputQuantizer):
    """A sign with a threshold that is learned for all channels together, or for each place."""

    def __init__(self, *shape):
        super().__init__()
        self.threshold = nn.Parameter(torch.full(shape, 0.25))

    def forward(self, a):
        return torch.where(a >= self.threshold, 1.0, -1.0)


@torch.no_grad()
def test_thresholds_of_other_shapes():
    how = {"weight_quantizer": SquareWave(20.0)}
    x = torch.randn(2, 8, 3, 3)
    shared, apart = (
        nn.Sequential(biper.BinaryConv2d(8, 16, 3, input_quantizer=OneForAll(*shape), **how)).eval()
        for shape in ((1,), (8, 3, 3))
    )
    assert torch.equal(pack(shared)(x), shared(x))
    with pytest.raises(UsageError, match="compute in a way of their own"):
        pack(apart)


def test_a_layer_shows_its_threshold_if_it_has_one():
    how = {"weight_quantizer": SquareWave(20.0)}
    assert "threshold" not in repr(PackedConv2d.of(biper.BinaryConv2d(3, 4, 3, **how)))
    how["input_quantizer"] = RSign()
    assert repr(PackedConv2d.of(biper.BinaryConv2d(3, 4, 3, **how))).endswith("threshold=True)")
    assert repr(PackedLinear.of(biper.BinaryLinear(3, 4, **how))).endswith("threshold=True)")


def test_costs_of_a_binary_linear_layer_are_its_weights_once():
    layer, own = costs(nn.Sequential(nn.Flatten(), biper.BinaryLinear(48, 10), nn.Linear(10, 5)), 4)
    assert (layer.kind, layer.binary, layer.bops, layer.flops) == ("binary linear", 480, 480, 0)
    assert (own.kind, own.flops) == ("linear", 50)


def test_costs_count_thresholds_with_their_layer():
    models = (with_quantizers(XNOR, kind, "rprelu") for kind in (biper.Sign, RSign))
    one, other = ({cost.name: cost for cost in costs(model, 8)} for model in models)
    assert list(one) == list(other)
    name = "layer2.0.conv1"
    assert (other[name].real - one[name].real, other[name].packed - one[name].packed) == (16, 64)
    assert (one["layer2.0.activation1"].real, one["layer2.0.activation1"].packed) == (3 * 32, 3 * 32 * 4)
