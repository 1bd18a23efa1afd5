"""A packed network's graph, run on an image, while the nodes of its QONNX file are noted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from biper.errors import UsageError
from biper.nn.graph import described, is_watched, module_of, mutates, trace
from biper.packed.compile import WHOLE, Shapes

DOMAIN = "qonnx.custom_op.general"  # of BipolarQuant and Quant


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

    ways: how operations are written, by what they call; bits: of real layers' weights, None for float32.
    records, constants: what a file consists of, once it has run. Raises what torch.fx raises for a network that it
    cannot trace, and when it runs UsageError, which names the layer, for an operation that has no node.
    """

    def __init__(self, network: nn.Module, ways: "Ways", bits: int | None) -> None:
        super().__init__(fx.GraphModule(network, trace(network, leaves=WHOLE, fresh=WHOLE)))
        self.modules, self.ways, self.bits = dict(network.named_modules()), ways, bits
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
                raise UsageError(f"{described(n, module)} cannot be written as QONNX{error}") from error
        return result

    def _written(self, call: Call) -> str:
        n, module = call.node, call.module
        if mutates(n, module):
            raise Unknown(": it writes into what it is given")
        if module is not None and is_watched(module):
            raise Unknown(": hooks watch it")
        kind = self.kind(n)
        if kind not in self.ways:
            raise Unknown("")
        return self.ways[kind](self, call)

    def kind(self, n: fx.Node) -> Any:  # noqa: ANN401
        """What a node calls: the class of a module, a function, or the name of a method."""
        module = module_of(n, self.modules)
        return n.target if module is None else type(module)

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


Ways = Mapping[Any, Callable[[Writer, Call], str]]  # each notes nodes and gives the name of the last one's tensor


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
