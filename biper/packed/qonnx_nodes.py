"""The operations of a packed network's graph as nodes of QONNX."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from biper.errors import UsageError
from biper.models.vgg import of_our_size
from biper.nn.activations import RPReLU
from biper.nn.graph import is_plain_hardtanh, is_watched, module_of, mutates, sole_user, trace
from biper.nn.layers import RealConv2d, RealLinear
from biper.packed.compile import WHOLE, Shapes
from biper.packed.layers import FoldedNorm, PackedConv2d, PackedLinear, padding_of

DOMAIN = "qonnx.custom_op.general"  # of BipolarQuant and Quant
ELEMENTWISE = {
    operator.add: "Add",
    torch.add: "Add",
    operator.sub: "Sub",
    torch.sub: "Sub",
    operator.mul: "Mul",
    torch.mul: "Mul",
}
KEPT = ("contiguous", of_our_size, nn.Identity, nn.Dropout, nn.Dropout2d)  # give what they are given
FLAT = (torch.flatten, "flatten", "view", "reshape", nn.Flatten)  # make a vector of an image's numbers
WINDOW = ("kernel_size", "stride", "padding")


@dataclass(frozen=True)
class Record:
    """A node of the file; `name` is that of the tensor that it gives."""

    kind: str
    inputs: list[str]
    name: str
    domain: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """A node of the graph as it is called: the tensor's name that it is given first, further arguments, its result."""

    node: fx.Node
    module: Any  # that it calls, if any
    x: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Tensor

    def given(self, *names: str) -> dict[str, Any]:
        """Its arguments behind the first, by name."""
        return dict(zip(names, self.args[1:], strict=False)) | dict(self.kwargs)

    @property
    def before(self) -> torch.Size:
        """The shape of what it is given first."""
        shape: torch.Size = self.args[0].shape
        return shape


class Unknown(Exception):
    """An operation, or a way to call it, that has no node."""


class Writer(Shapes):
    """Runs a packed network's graph on an image and notes, for every operation, the nodes that do the same.

    records, constants: what a file consists of, once it has run. Raises what torch.fx raises for a network that it
    cannot trace, and when it runs UsageError, which names the layer, for an operation that has no node.
    """

    def __init__(self, network: nn.Module, bits: int | None) -> None:
        super().__init__(fx.GraphModule(network, trace(network, leaves=WHOLE, fresh=WHOLE)))
        self.modules, self.bits = dict(network.named_modules()), bits
        self.records: list[Record] = []
        self.constants: dict[str, npt.NDArray[np.generic]] = {}
        self.names: dict[fx.Node, str] = {}  # of the tensors that nodes give

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        """The node's value."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        result = super().run_node(n)
        if not isinstance(result, Tensor):
            return result
        if n.op == "placeholder":
            self.names[n] = "images"
        elif n.op == "output":
            self.records.append(Record("Identity", [self.names[n.all_input_nodes[0]]], "logits"))
        elif n.op == "get_attr":
            self.names[n] = self.constant(n.name, result)
        else:
            module = module_of(n, self.modules)
            first = n.all_input_nodes[0] if n.all_input_nodes else None
            call = Call(n, module, self.names.get(first, "") if first else "", args, kwargs, result)
            try:
                self.names[n] = self._written(call)
            except Unknown as error:
                raise UsageError(f"{_described(n, module)} cannot be written as QONNX{error}") from error
        return result

    def _written(self, call: Call) -> str:
        n, module = call.node, call.module
        if mutates(n, module):
            raise Unknown(": it writes into what it is given")
        if module is not None and is_watched(module):
            raise Unknown(": hooks watch it")
        kind = _kind(n, self)
        if kind in KEPT:
            return call.x
        if kind not in WRITERS:
            raise Unknown("")
        return WRITERS[kind](self, call)

    def node(self, kind: str, inputs: Sequence[str], domain: str = "", **attributes: Any) -> str:  # noqa: ANN401
        """Note a node; the name of the tensor that it gives."""
        name = f"t{len(self.records)}"
        self.records.append(Record(kind, list(inputs), name, domain, attributes))
        return name

    def constant(self, name: str, value: Tensor | float) -> str:
        """Note a constant; its name."""
        array = torch.as_tensor(value).detach().cpu().contiguous().numpy()
        self.constants[name] = array.astype(np.float32) if array.dtype.kind == "f" else array
        return name

    def signs(self, x: str) -> str:
        """-1 and +1: the latter from 0 on."""
        return self.node("BipolarQuant", [x, self.constant("one", 1.0)], DOMAIN)

    def weight(self, name: str, weight: Tensor, transposed: bool) -> str:
        """The weights (C_out, ...) of a real layer, behind a Quant node where they are to have few bits."""
        constant = self.constant(f"{name}.weight", weight.T if transposed else weight)
        if self.bits is None:
            return constant
        scale = weight_scale(weight, self.bits)
        inputs = self.constant(f"{name}.scale", scale.view(()) if transposed else scale), self.constant("zero", 0.0)
        bits = self.constant("bits", float(self.bits))
        return self.node("Quant", [constant, *inputs, bits], DOMAIN, signed=1, narrow=1, rounding_mode="ROUND")


def weight_scale(weight: Tensor, bits: int) -> Tensor:
    """A step of weights that have the integers -(2^(bits-1) - 1) to 2^(bits-1) - 1: (C_out, 1, 1, 1) of a convolution.

    A linear layer has one, (1, 1), for all: hls4ml does not take more.
    """
    dims = tuple(range(1 if weight.dim() == 4 else 0, weight.dim()))
    largest = weight.detach().abs().amax(dim=dims, keepdim=True)
    return torch.where(largest > 0, largest / (2 ** (bits - 1) - 1), torch.ones_like(largest))


def round_weight(weight: Tensor, bits: int) -> Tensor:
    """Weights (C_out, ...) rounded to so many bits, as a Quant node does it."""
    scale, most = weight_scale(weight, bits), 2 ** (bits - 1) - 1
    return (weight / scale).clamp(-most, most).round() * scale


def _described(n: fx.Node, module: nn.Module | None) -> str:
    if module is not None:
        return f"layer {n.target} ({type(module).__name__})"
    return f"the operation {getattr(n.target, '__name__', n.target)} ({n.name})"


def _kind(n: fx.Node, writer: Writer) -> Any:  # noqa: ANN401
    """What a node calls: the class of a module, a function, or the name of a method."""
    module = module_of(n, writer.modules)
    return n.target if module is None else type(module)


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
    shape = {"kernel_shape": _pair(kernel), "strides": _pair(stride), "dilations": _pair(dilation)}
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
    """Gain and shift of a batch norm that has seen no images: hls4ml takes other products with a tensor's channels ill."""
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
    if user is not None and is_plain_hardtanh(call.node) and _kind(user, writer) in FLAT:
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
    shape = {"kernel_shape": size, "strides": _pair(given.get("stride") or size)}
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
    over = given.get("ceil_mode", False) and any((n - k) % s for n, k, s in zip(call.before[2:], size, stride, strict=True))
    if given.get("divisor_override") or (any(padding) and given.get("ceil_mode")):
        raise Unknown(": of averages over windows with a divisor or rounded sizes and padding")
    how = {"ceil_mode": int(over), "count_include_pad": int(counted)}
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


WRITERS: Mapping[Any, Callable[[Writer, Call], str]] = {
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
