"""The operations of a packed network's graph as nodes of QONNX: one function for each kind."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from biper.models.vgg import of_our_size
from biper.nn.activations import RPReLU
from biper.nn.graph import is_plain_hardtanh, module_of, sole_user
from biper.nn.layers import RealConv2d, RealLinear
from biper.packed.layers import FoldedNorm, PackedConv2d, PackedLinear, padding_of
from biper.packed.qonnx_writer import Call, Unknown, Ways, Writer

ELEMENTWISE = {
    operator.add: "Add",
    torch.add: "Add",
    operator.sub: "Sub",
    torch.sub: "Sub",
    operator.mul: "Mul",
    torch.mul: "Mul",
}
FLAT = (torch.flatten, "flatten", "view", "reshape", nn.Flatten)  # make a vector of an image's numbers
WINDOW = ("kernel_size", "stride", "padding")


def _pair(value: Any) -> list[int]:  # noqa: ANN401
    return [int(value)] * 2 if isinstance(value, int) else [int(v) for v in value]


def _name(call: Call) -> str:
    return str(call.node.target)


def _binary_conv(writer: Writer, call: Call) -> str:
    m, name = call.module, _name(call)
    x = _signed(writer, call, (1, -1, 1, 1))
    weight = writer.signs(writer.constant(f"{name}.weight", m.binary_weight()))
    sums = _conv(writer, [x, weight], m.kernel_size, m.stride, m.padding, m.dilation, m.groups)
    return _scaled(writer, call, sums, (1, -1, 1, 1))


def _binary_linear(writer: Writer, call: Call) -> str:
    x = _signed(writer, call, (-1,))
    weight = writer.signs(writer.constant(f"{_name(call)}.weight", call.module.binary_weight().T))
    return _scaled(writer, call, writer.node("MatMul", [x, weight]), (-1,))


def _signed(writer: Writer, call: Call, shape: tuple[int, ...]) -> str:
    """What a binary layer sees: the signs of its input from its thresholds on, or the input where that stays real."""
    m = call.module
    if not m.binary_activations:
        return call.x
    if m.threshold is None:
        return writer.signs(call.x)
    threshold = writer.constant(f"{_name(call)}.threshold", m.threshold.view(shape))
    return writer.signs(writer.node("Sub", [call.x, threshold]))


def _scaled(writer: Writer, call: Call, sums: str, shape: tuple[int, ...]) -> str:
    """A binary layer's sums times alpha, and its bias."""
    m, name = call.module, _name(call)
    out = writer.node("Mul", [sums, writer.constant(f"{name}.alpha", m.alpha.view(shape))])
    if m.bias is None:
        return out
    return writer.node("Add", [out, writer.constant(f"{name}.bias", m.bias.view(shape))])


def _conv(
    writer: Writer,
    inputs: list[str],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str:
    """A convolution of which zeros at the border add nothing to the sums: they are put in behind the signs."""
    shape: dict[str, Any] = {"kernel_shape": _pair(kernel), "strides": _pair(stride), "dilations": _pair(dilation)}
    return writer.node("Conv", inputs, **shape, pads=_pair(padding) * 2, group=groups)


def _real_conv(writer: Writer, call: Call) -> str:
    m, name = call.module, _name(call)
    inputs = [call.x, writer.weight(name, m.weight, transposed=False)]
    if m.bias is not None:
        inputs.append(writer.constant(f"{name}.bias", m.bias))
    return _conv(writer, inputs, m.kernel_size, m.stride, padding_of(m), m.dilation, m.groups)


def _real_linear(writer: Writer, call: Call) -> str:
    m, name = call.module, _name(call)
    out = writer.node("MatMul", [call.x, writer.weight(name, m.weight, transposed=True)])
    return out if m.bias is None else writer.node("Add", [out, writer.constant(f"{name}.bias", m.bias)])


def _norm(writer: Writer, call: Call) -> str:
    """A batch norm of mean 0 and variance 1, which hls4ml reads better than a product and a sum."""
    m, name = call.module, _name(call)
    values = {"gain": m.gain, "shift": m.shift, "mean": torch.zeros_like(m.gain), "variance": torch.ones_like(m.gain)}
    constants = [writer.constant(f"{name}.{part}", value) for part, value in values.items()]
    return writer.node("BatchNormalization", [call.x, *constants], epsilon=0.0)


def _prelu(writer: Writer, call: Call) -> str:
    slope = call.module.weight.view(-1, *[1] * (call.result.dim() - 2))
    return writer.node("PRelu", [call.x, writer.constant(f"{_name(call)}.slope", slope)])


def _rprelu(writer: Writer, call: Call) -> str:
    m, name = call.module, _name(call)
    x = writer.node("Sub", [call.x, writer.constant(f"{name}.before", m.before[None])])
    x = writer.node("PRelu", [x, writer.constant(f"{name}.slope", m.weight.view(-1, 1, 1))])
    return writer.node("Add", [x, writer.constant(f"{name}.after", m.after[None])])


def _hardtanh(writer: Writer, call: Call) -> str:
    """Nothing where only signs follow, which it does not change; where a vector is made of it, it is written behind."""
    if is_plain_hardtanh(call.node) and all(_sees_signs(user, writer) for user in call.node.users):
        return call.x
    user = sole_user(call.node)
    if user is not None and is_plain_hardtanh(call.node) and writer.kind(user) in FLAT:
        return call.x
    given = {"min_val": -1.0, "max_val": 1.0} | call.given("min_val", "max_val", "inplace")
    return _clip(writer, call.x, given["min_val"], given["max_val"])


def _sees_signs(user: fx.Node, writer: Writer) -> bool:
    """Whether a node takes the signs of its input, from thresholds on that hardtanh does not move: in (-1, 1]."""
    m = module_of(user, writer.modules)
    if not isinstance(m, PackedConv2d | PackedLinear) or not m.binary_activations:
        return False
    return m.threshold is None or bool(((m.threshold > -1) & (m.threshold <= 1)).all())


def _clip(writer: Writer, x: str, low: float, high: float) -> str:
    return writer.node("Clip", [x, writer.constant(f"from {low:g}", low), writer.constant(f"to {high:g}", high)])


def _bounded(writer: Writer, x: str) -> str:
    """The hardtanh of vectors as x - relu(x - 1) + relu(-1 - x), exact in between: hls4ml reads no Clip."""
    over = writer.node("Relu", [writer.node("Sub", [x, writer.constant("to 1", 1.0)])])
    under = writer.node("Relu", [writer.node("Sub", [writer.constant("from -1", -1.0), x])])
    return writer.node("Add", [writer.node("Sub", [x, over]), under])


def _relu6(writer: Writer, call: Call) -> str:
    return _clip(writer, call.x, 0.0, 6.0)


def _relu(writer: Writer, call: Call) -> str:
    return writer.node("Relu", [call.x])


def _elementwise(writer: Writer, call: Call) -> str:
    if call.kwargs or len(call.node.args) != 2:
        raise Unknown(": it has further arguments")
    inputs = []
    for argument, value in zip(call.node.args, call.args, strict=True):
        if isinstance(argument, fx.Node) and argument in writer.names:
            inputs.append(writer.names[argument])
        else:
            inputs.append(writer.constant(f"{call.node.name}.{len(inputs)}", float(value)))
    return writer.node(ELEMENTWISE[call.node.target], inputs)  # type: ignore[index]


def _maximum(writer: Writer, call: Call) -> str:
    given = call.given(*WINDOW, "dilation", "ceil_mode", "return_indices")
    size = _pair(given["kernel_size"])
    shape: dict[str, Any] = {"kernel_shape": size, "strides": _pair(given.get("stride") or size)}
    padding, dilation = _pair(given.get("padding", 0)), _pair(given.get("dilation", 1))
    if given.get("ceil_mode") or dilation != [1, 1]:
        raise Unknown(": its windows are dilated, or reach over the border")
    return writer.node("MaxPool", [call.x], **shape, pads=padding * 2)


def _average(writer: Writer, call: Call) -> str:
    given = call.given(*WINDOW, "ceil_mode", "count_include_pad", "divisor_override")
    size = _pair(given["kernel_size"])
    stride, padding = _pair(given.get("stride") or size), _pair(given.get("padding", 0))
    if size == list(call.before[2:]) and not any(padding) and not given.get("divisor_override"):
        return writer.node("GlobalAveragePool", [call.x])
    counted = given.get("count_include_pad", True) and any(padding)
    over = given.get("ceil_mode", False) and any(
        (n - k) % s for n, k, s in zip(call.before[2:], size, stride, strict=True)
    )
    if given.get("divisor_override") or (any(padding) and given.get("ceil_mode")):
        raise Unknown(": of averages over windows with a divisor or rounded sizes and padding")
    how: dict[str, Any] = {"ceil_mode": int(over), "count_include_pad": int(counted)}
    return writer.node("AveragePool", [call.x], kernel_shape=size, strides=stride, pads=padding * 2, **how)


def _adaptive_average(writer: Writer, call: Call) -> str:
    before, after = call.before[2:], call.result.shape[2:]
    if tuple(after) == (1, 1):
        return writer.node("GlobalAveragePool", [call.x])
    if any(n % m for n, m in zip(before, after, strict=True)):
        raise Unknown(": its windows overlap")
    size = [n // m for n, m in zip(before, after, strict=True)]
    return writer.node("AveragePool", [call.x], kernel_shape=size, strides=size, pads=[0] * 4)


def _mean(writer: Writer, call: Call) -> str:
    given = call.given("dim", "keepdim")
    dims = given.get("dim")
    if call.before[1:2] != call.result.shape[1:2] or not isinstance(dims, list | tuple) or len(call.before) != 4:
        raise Unknown(": of means those over height and width can")
    if {d % 4 for d in dims} != {2, 3}:
        raise Unknown(": of means those over height and width can")
    x = writer.node("GlobalAveragePool", [call.x])
    return x if given.get("keepdim") else writer.node("Flatten", [x], axis=1)


def _flatten(writer: Writer, call: Call) -> str:
    if call.result.dim() != 2 or len(call.result) != call.before[0]:
        raise Unknown(": of new shapes those of a vector for each image can")
    vectors = writer.node("Flatten", [call.x], axis=1)
    source = call.node.all_input_nodes[0]
    left_out = is_plain_hardtanh(source) and call.x == writer.names[source.all_input_nodes[0]]
    return _bounded(writer, vectors) if left_out else vectors


def _pad(writer: Writer, call: Call) -> str:
    given = call.given("pad", "mode", "value")
    if given.get("mode", "constant") != "constant" or given.get("value"):
        raise Unknown(": it pads with something else than zeros")
    pairs = list(zip(given["pad"][::2], given["pad"][1::2], strict=True))[::-1]
    pairs = [(0, 0)] * (call.result.dim() - len(pairs)) + pairs
    ends = torch.tensor([front for front, _ in pairs] + [behind for _, behind in pairs])
    return writer.node("Pad", [call.x, writer.constant(f"{call.node.name}.pads", ends)], mode="constant")


def _concatenate(writer: Writer, call: Call) -> str:
    parts = call.node.args[0]
    if not isinstance(parts, list | tuple) or not all(part in writer.names for part in parts):
        raise Unknown(": it is given something else than tensors")
    return writer.node("Concat", [writer.names[part] for part in parts], axis=call.given("dim").get("dim", 0))  # type: ignore[index]


def _kept(writer: Writer, call: Call) -> str:
    """What gives what it is given."""
    return call.x


WAYS: Ways = {
    **dict.fromkeys(("contiguous", of_our_size, nn.Identity, nn.Dropout, nn.Dropout2d), _kept),
    PackedConv2d: _binary_conv,
    PackedLinear: _binary_linear,
    FoldedNorm: _norm,
    **dict.fromkeys((nn.Conv2d, RealConv2d), _real_conv),
    **dict.fromkeys((nn.Linear, RealLinear), _real_linear),
    nn.PReLU: _prelu,
    RPReLU: _rprelu,
    F.hardtanh: _hardtanh,
    **dict.fromkeys((F.relu, torch.relu, "relu"), _relu),
    **dict.fromkeys((F.relu6, nn.ReLU6), _relu6),
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    F.max_pool2d: _maximum,
    F.avg_pool2d: _average,
    **dict.fromkeys((F.adaptive_avg_pool2d, nn.AdaptiveAvgPool2d), _adaptive_average),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys(FLAT, _flatten),
    F.pad: _pad,
    torch.cat: _concatenate,
}
