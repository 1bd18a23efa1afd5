"""QONNX files: what their nodes are, and, where FPGA tools are installed, that these compute and read the same."""

import importlib.util
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from test_packed import network
from test_packed import trained as with_values
from torch import nn

import biper
from biper.commands.export import main as export_main
from biper.errors import UsageError
from biper.nn.comparison_quantizers import RSign
from biper.nn.layers import binary_layers
from biper.nn.quantizers import SquareWave
from biper.packed.pack import pack
from biper.packed.qonnx import export_qonnx, qonnx_contents, rounded
from biper.packed.qonnx_writer import round_weight, weight_scale

NAMES = [name for name in biper.list_models("cifar10") if name.endswith("_1w1a")]
OWN = {"padding": 1, "weight_quantizer": SquareWave(20.0)}


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"pip install {package}")


def size_of(name):
    return 32 if name.startswith("vgg") else 9


def own(*layers, size=8, channels=8, vector=True):
    """A network with a binary convolution from colours, layers of a test, and a classifier."""
    head = [nn.Flatten(), nn.Linear(channels * size * size, 10)] if vector else []
    return with_values(
        nn.Sequential(biper.BinaryConv2d(3, channels, 3, **OWN), nn.BatchNorm2d(channels), *layers, *head)
    )


def graph_of(contents):
    return onnx.load_model_from_string(contents).graph


def cleaned(contents, images=None):
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    return cleanup_model(ModelWrapper(contents), override_inpsize=images)


@torch.no_grad()
def require_equal(packed, contents, x):
    """Logits of the package qonnx for images (N, 3, S, S) are those of the packed network."""
    from qonnx.core.onnx_exec import execute_onnx

    model, expected = cleaned(contents, len(x)), packed(x)
    result = execute_onnx(model, {model.graph.input[0].name: x.numpy()})[model.graph.output[0].name]
    found = torch.from_numpy(result)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
    assert torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("name", NAMES)
def test_nodes_of_every_architecture(name):
    model = network(name)
    graph = graph_of(qonnx_contents(pack(model), size_of(name)))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kinds = Counter(node.op_type for node in graph.node)
    layers = [layer_name for layer_name, _ in binary_layers(model)]
    assert kinds["BipolarQuant"] == 2 * len(layers)
    assert kinds["Conv"] == len(layers) + 1
    signs = [node for node in graph.node if node.op_type == "BipolarQuant"]
    assert all(node.domain == "qonnx.custom_op.general" and not node.attribute for node in signs)
    assert all(constants[node.input[1]] == 1 for node in signs)
    for layer in layers:
        assert set(np.unique(constants[f"{layer}.weight"])) <= {-1.0, 1.0}
        assert any(node.op_type == "Mul" and f"{layer}.alpha" in node.input for node in graph.node)


def test_zeros_are_added_behind_the_signs():
    graph = graph_of(qonnx_contents(pack(network("resnet20_1w1a")), 9))
    made = {node.output[0]: node for node in graph.node}
    binary = [n for n in graph.node if n.op_type == "Conv" and n.input[1] in made]
    assert len(binary) == 18
    for node in binary:
        assert made[node.input[0]].op_type == made[node.input[1]].op_type == "BipolarQuant"
        assert {a.name: list(a.ints) for a in node.attribute}["pads"] == [1, 1, 1, 1]


@pytest.mark.parametrize(("threshold", "clips"), [(-1.5, 1), (-1.0, 1), (-0.9, 0), (0.0, 0), (1.0, 0), (1.1, 1)])
def test_hardtanh_is_written_where_it_changes_signs(threshold, clips):
    """Of what lies below -1 it makes -1, of what lies above 1 it makes 1: where signs begin at these matters."""
    model = own(nn.Hardtanh(), biper.BinaryConv2d(8, 8, 3, input_quantizer=RSign(), **OWN), vector=False)
    model[3].input_quantizer.threshold.data.fill_(threshold)
    kinds = Counter(node.op_type for node in graph_of(qonnx_contents(pack(model), 8)).node)
    assert kinds["Clip"] == clips


@needs("qonnx")
@pytest.mark.parametrize("name", [*(n for n in NAMES if n != "resnet34_1w1a"), "resnet20_1w32a"])
def test_logits_of_every_architecture(name):
    """But ResNet-34's, which has ResNet-18's blocks."""
    packed = pack(network(name))
    require_equal(packed, qonnx_contents(packed, size_of(name)), torch.randn(2, 3, size_of(name), size_of(name)))


@needs("qonnx")
@torch.no_grad()
def test_mobilenet():
    packed = pack(network("mobilenet_1w1a", "imagenet"))
    require_equal(packed, qonnx_contents(packed, 33), torch.randn(1, 3, 33, 33))


class Own(nn.Module):
    """What a network of somebody's own may do."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding="valid", bias=True)
        self.conv = biper.BinaryConv2d(16, 12, 3, groups=2, dilation=2, bias=True, input_quantizer=RSign(), **OWN)
        self.act, self.drop = nn.PReLU(), nn.Dropout(0.5)
        self.hidden = biper.BinaryLinear(12, 7, weight_quantizer=SquareWave(20.0), input_quantizer=RSign())

    def forward(self, x):
        x = F.relu6(self.stem(x)) * 0.5 - 1
        x = self.conv(F.hardtanh(torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1)))
        return self.hidden(self.drop(self.act(x)).mean((2, 3)))


@needs("qonnx")
@torch.no_grad()
def test_networks_of_ones_own():
    packed = pack(with_values(Own()))
    require_equal(packed, qonnx_contents(packed, 13), torch.randn(4, 3, 13, 13))


@needs("qonnx")
def test_signs_at_the_threshold_are_plus_one():
    layer = biper.BinaryConv2d(4, 2, 1, weight_quantizer=SquareWave(20.0), input_quantizer=RSign())
    with torch.no_grad():
        layer.input_quantizer.threshold.copy_(torch.tensor([0.0, 0.3, -0.7, 0.1])[:, None, None])
    packed = pack(nn.Sequential(layer, nn.Flatten()).eval())
    x = torch.tensor([0.0, 0.3, -0.7, 0.1])[None, :, None, None]
    contents = qonnx_contents(packed, example=x)
    require_equal(packed, contents, torch.cat([x, -x, torch.nextafter(x, torch.tensor(-1.0))]))


def test_a_hardtanh_goes_where_only_signs_follow():
    clipped = [Counter(n.op_type for n in graph_of(qonnx_contents(pack(m), 8)).node) for m in (
        own(nn.Hardtanh(), biper.BinaryConv2d(8, 8, 3, **OWN)),
        own(nn.Hardtanh(-2, 2), biper.BinaryConv2d(8, 8, 3, **OWN)),
    )]  # fmt: skip
    assert [kinds["Clip"] for kinds in clipped] == [0, 1]


@needs("qonnx")
@pytest.mark.parametrize("bits", [2, 8])
@torch.no_grad()
def test_bits_of_real_layers(bits):
    packed = pack(network("resnet20_1w1a"))
    contents = qonnx_contents(packed, 9, bits=bits)
    nodes = [node for node in graph_of(contents).node if node.op_type == "Quant"]
    assert [node.input[0] for node in nodes] == ["conv1.weight", "linear.weight"]
    few = rounded(packed, bits)
    steps = few.network.conv1.weight / few.network.conv1.weight.abs().amax((1, 2, 3), keepdim=True)
    assert len(steps.mul(2 ** (bits - 1) - 1).round().unique()) <= 2**bits - 1
    assert not torch.equal(few.network.conv1.weight, packed.network.conv1.weight)
    require_equal(few, contents, torch.randn(3, 3, 9, 9))


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_largest_weight_has_the_largest_integer(bits):
    weight = torch.randn(4, 3, 3, 3)
    integers = round_weight(weight, bits) / weight_scale(weight, bits)
    torch.testing.assert_close(integers.abs().amax((1, 2, 3)), torch.full((4,), 2.0 ** (bits - 1) - 1))
    torch.testing.assert_close(integers, integers.round())
    largest = weight.abs().amax((1, 2, 3))
    torch.testing.assert_close(round_weight(weight, bits).abs().amax((1, 2, 3)), largest)  # nothing is clipped


@needs("qonnx")
def test_costs_are_those_of_the_summary(tmp_path):
    from qonnx.util.inference_cost import inference_cost

    from biper.packed.costs import costs, total

    model = network("vgg_small_1w1a")
    export_qonnx(pack(model), tmp_path / "net.onnx", 32)
    found, whole = inference_cost(str(tmp_path / "net.onnx"))["total_cost"], total(costs(model, 32))
    assert found["op_mac_BIPOLAR_BIPOLAR"] == whole.bops
    assert found["op_mac_FLOAT32_FLOAT32"] == whole.flops
    assert found["mem_w_BIPOLAR"] == whole.binary


@needs("qonnx")
@needs("hls4ml")
@pytest.mark.filterwarnings("ignore")  # of its own code
def test_hls4ml_reads_vgg_small(tmp_path):
    import hls4ml
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
    from qonnx.util.cleanup import cleanup_model

    model = cleaned(qonnx_contents(pack(network("vgg_small_1w1a")), 32, bits=8))
    model = cleanup_model(model.transform(ConvertToChannelsLastAndClean(make_input_channels_last=True)))
    for node in model.graph.node:
        if node.op_type == "Mul":
            model.set_initializer(node.input[1], model.get_initializer(node.input[1])[0])  # it wants no batch's axis
    config = hls4ml.utils.config.config_from_onnx_model(model, granularity="name", backend="Vitis")
    where = {"output_dir": str(tmp_path), "hls_config": config, "backend": "Vitis", "io_type": "io_stream"}
    layers = list(hls4ml.converters.convert_from_onnx_model(model, **where).get_layers())
    kinds = Counter(type(layer).__name__ for layer in layers)
    assert (kinds["VitisConv2D"], kinds["VitisDense"]) == (6, 1)
    binary = [layer for layer in layers if type(layer).__name__ == "VitisConv2D"][1:]
    assert all(layer.get_attr("weight_t").precision.width == 1 for layer in binary)


class Shifted(nn.Module):
    def forward(self, x):
        return x.roll(1, 3)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.GELU(), r"layer 2 \(GELU\)"),
        (nn.GroupNorm(2, 8), r"layer 2 \(GroupNorm\)"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.MaxPool2d(1, ceil_mode=True), "border"),
        (Shifted(), r"the operation roll"),
    ],
)
def test_what_cannot_be_written_is_named(layer, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        export_qonnx(pack(own(layer)), tmp_path / "net.onnx", 8)
    assert not list(tmp_path.iterdir())


def test_bad_input_of_the_function(tmp_path):
    packed = pack(own())
    for bits in (0, 1, 17):
        with pytest.raises(UsageError, match="2 to 16 bits"):
            export_qonnx(packed, tmp_path / "net.onnx", 8, bits=bits)
    with pytest.raises(UsageError, match="packed networks"):
        export_qonnx(own(), tmp_path / "net.onnx", 8)
    with pytest.raises(UsageError, match="size of its images"):
        export_qonnx(packed, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_the_command_and_what_it_refuses(trained, command, refused, tmp_path, monkeypatch):
    best, target, file = trained / "stage2/model_best.pth.tar", tmp_path / "net.safetensors", tmp_path / "net.onnx"
    cases = {
        "is of stage 1, whose weights are real": [trained / "stage1/model_best.pth.tar", "-o", target, "--qonnx", file],
        "exists and is another kind": [best, "-o", target, "--qonnx", best],
        "--onnx and --qonnx are both": [best, "-o", target, "--onnx", file, "--qonnx", file],
        "--bits is of --qonnx": [best, "-o", target, "--bits", 8],
        "2 to 16 bits": [best, "-o", target, "--qonnx", file, "--bits", 1],
    }
    for message, argv in cases.items():
        assert message in refused(*argv, entry=export_main)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "biper[onnx]" in refused(best, "-o", target, "--qonnx", file, entry=export_main)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    code, out, err = command(best, "-o", target, "--qonnx", file, "--bits", 8, entry=export_main)
    assert code == 0, err
    assert f"{file}: {file.stat().st_size:,} bytes, QONNX" in out + err
    assert "with real layers' weights of 8 bits" in out + err
    assert [d.dim_value for d in onnx.load(file).graph.input[0].type.tensor_type.shape.dim] == [1, 3, 8, 8]
