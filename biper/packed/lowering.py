"""From a segment of a network's graph to a program: what follows a convolution becomes part of its instruction."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from biper.nn.activations import RPReLU
from biper.nn.graph import Part, follow
from biper.packed import runtime
from biper.packed.layers import FoldedNorm, PackedConv2d
from biper.packed.program import Affine, After, Compiled, Geometry, Program, Shape, Slopes, Value
from biper.packed.steps import Step, Steps, Window, shape_of

# whatever torch's defaults are: the instructions write these
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "memory_format": torch.channels_last}
Signs = tuple[fx.Node, PackedConv2d | None]  # a value's, and the convolution whose threshold they have; None: it is 0


@dataclass
class Chain:
    """Nodes that become one instruction."""

    source: fx.Node
    nodes: list[fx.Node]
    conv: PackedConv2d | None = None
    real: Step | None = None  # a convolution of real values
    pool: bool = False
    norm: FoldedNorm | None = None
    skip: fx.Node | None = None
    activation: Step | None = None
    window: Window = (1, 1, 0)
    average: int = 0  # the side of its windows; 1 if channels are all that changes
    front: int = 0
    copies: int = 1

    @property
    def last(self) -> fx.Node:
        """Whose value the instruction gives."""
        return self.nodes[-1]


def chains(nodes: Sequence[fx.Node], steps: Steps) -> list[Chain]:
    """The segment's nodes as instructions, in an order in which they can run."""
    free, found = set(nodes), []
    for node in nodes:
        if node in free:
            chain = _chain(node, steps, free)
            free.difference_update(chain.nodes)
            found.append(chain)
    place = {node: i for i, node in enumerate(nodes)}
    return sorted(found, key=lambda chain: place[chain.last])


def _chain(start: fx.Node, steps: Steps, free: set[fx.Node]) -> Chain:
    """The node and what of the free ones follows it alone."""
    chain, order = Chain(start.all_input_nodes[0], []), ["norm", "add", "activation", "maximum"]
    kind = steps[start].kind
    if kind == "conv":
        order = ["conv", "pool", "norm", "add", "activation"]
    elif kind == "real":
        order = ["real", "norm", "add", "activation"]
    elif kind in ("average", "pad"):
        order = ["average", "pad"]
    elif kind == "repeat":
        order = ["repeat"]

    def parts_of(node: fx.Node, so_far: Sequence[Part]) -> list[str]:
        return _parts(steps[node], so_far) if node in free else []

    for part, node in follow(start, order, parts_of):
        _take(chain, node, steps[node], part)
    return chain


def _parts(step: Step, so_far: Sequence[Part]) -> list[str]:
    """Which parts of an instruction a step can be, behind those so far."""
    if step.kind != "maximum":
        return [step.kind]
    sums = ["pool"] if step.window == (2, 2, 0) else []  # of a convolution, before anything else happens to them
    return sums if "conv" in dict(so_far) else [] if "add" in dict(so_far) else ["maximum"]


def _take(chain: Chain, node: fx.Node, step: Step, part: str) -> None:
    if part == "conv":
        assert isinstance(step.module, PackedConv2d)
        chain.conv = step.module
    elif part == "real":
        chain.real = step
    elif part == "norm":
        assert isinstance(step.module, FoldedNorm)
        chain.norm = step.module
    elif part == "add":
        before = chain.last if chain.nodes else chain.source
        chain.skip = next(a for a in node.args if isinstance(a, fx.Node) and a is not before)
    elif part in ("average", "pad", "repeat"):
        chain.average = max(chain.average, step.window[0])
    chain.pool |= part == "pool"
    if part == "activation":
        chain.activation = step
    elif part == "maximum":
        chain.window = step.window
    chain.front += step.front
    chain.copies *= step.copies
    chain.nodes.append(node)


@dataclass
class Lowering:
    """One segment's program under construction."""

    steps: Steps
    outputs: Sequence[fx.Node]
    program: Program = field(default_factory=Program)
    floats: dict[fx.Node, Value] = field(default_factory=dict)
    signs: dict[Signs, Value] = field(default_factory=dict)

    def take(self, chain: Chain) -> None:
        """Add a chain's instruction."""
        node, result = chain.last, _image(chain.last)
        readers = [user for user in node.users if user in self.steps and self.steps[user].kind == "conv"]
        wanted = dict.fromkeys(_signs(node, self.steps[user].module) for user in readers)
        skip = None if chain.skip is None else self.floats[chain.skip]
        after = After(self._norm(chain.norm), skip, *self._activation(chain.activation))
        enough = len(wanted) == 1 and _gives_bits(chain)  # other thresholds' bits are made of floats
        if node in self.outputs or len(readers) < len(node.users) or not enough:
            outside = self.program.activation() if node in self.outputs else None
            after.out = self.floats[node] = Value(result, outside=outside)
        if wanted and _gives_bits(chain):
            self._want(after, next(iter(wanted)))
        self._emit(chain, result, after)

    def _emit(self, chain: Chain, result: Shape, after: After) -> None:
        if chain.conv is not None:
            names = ("bits", "alpha") if chain.conv.bias is None else ("bits", "alpha", "bias")
            bits, alpha, *bias = _parameters(self.program, chain.conv, *names)
            seen = self._bits(_signs(chain.source, chain.conv))
            self.program.conv(seen, _geometry(chain), bits, alpha, after, *bias)
        elif chain.real is not None:
            _add_real(self.program, chain.real, self.floats[chain.source], after)
        elif chain.average:
            assert after.out is not None
            self.program.average(self.floats[chain.source], after.out, chain.average, chain.front, chain.copies)
        else:
            self.program.tail(self.floats[chain.source], result, after, chain.window)

    def _bits(self, signs: Signs) -> Value:
        if signs not in self.signs:
            after = After()
            self._want(after, signs)
            self.program.tail(self.floats[signs[0]], _image(signs[0]), after)
        return self.signs[signs]

    def _want(self, after: After, signs: Signs) -> None:
        """Let an instruction write signs."""
        node, conv = signs
        after.bits = self.signs[signs] = Value(_image(node), bits=True)
        if conv is not None:
            (after.threshold,) = _parameters(self.program, conv, "threshold")

    def _norm(self, norm: FoldedNorm | None) -> Affine | None:
        return None if norm is None else Affine(*_parameters(self.program, norm, "gain", "shift"))

    def _activation(self, step: Step | None) -> tuple[bool, Slopes | None]:
        """Whether it is hardtanh, and the parameters of another one."""
        if step is None or step.module is None:
            return step is not None, None
        names = ("weight", "before", "after") if isinstance(step.module, RPReLU) else ("weight",)
        return False, Slopes(*_parameters(self.program, step.module, *names))


def _signs(node: fx.Node, conv: nn.Module | None) -> Signs:
    """The signs of a node's value that a convolution reads."""
    assert isinstance(conv, PackedConv2d)
    return node, None if conv.threshold is None else conv


def _gives_bits(chain: Chain) -> bool:
    """Whether the instruction can write signs: means give values alone, and so do groups that end within a byte."""
    conv = chain.conv
    return not chain.average and (conv is None or conv.groups == 1 or (conv.out_channels // conv.groups) % 8 == 0)


def _parameters(program: Program, module: nn.Module, *names: str) -> list[int]:
    """Looked up whenever the program runs: a module that was moved has other tensors."""
    owns: list[dict[str, Any]] = [module._buffers if n in module._buffers else module._parameters for n in names]
    return [program.parameter(partial(own.__getitem__, name)) for own, name in zip(owns, names, strict=True)]


def _image(node: fx.Node) -> Shape:
    _, c, h, w = shape_of(node)
    return c, h, w


def _geometry(chain: Chain) -> Geometry:
    conv = chain.conv
    assert conv is not None
    shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    return Geometry(_image(chain.source), conv.out_channels, *shape, conv.groups, chain.pool)


def _add_real(program: Program, step: Step, x: Value, after: After) -> None:
    """Add a step's real convolution of the floats x to a program."""
    conv = step.module
    assert conv is not None
    (weight,) = _parameters(program, conv, "weight")
    program.real(x, _real_geometry(step, x.shape), weight, step.order, after)


def _real_geometry(step: Step, shape: Shape) -> Geometry:
    conv = step.module
    assert isinstance(conv, nn.Conv2d)
    assert not isinstance(conv.padding, str)
    pairs = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    kernel, stride, padding, dilation = ((pair[0], pair[1]) for pair in pairs)
    return Geometry(shape, conv.out_channels, kernel, stride, padding, dilation, conv.groups)


def real_convolution(step: Step, x: Tensor) -> Tensor:
    """A step's real convolution of x (N, C, H, W), by itself."""
    program, shape = Program(), (x.shape[1], x.shape[2], x.shape[3])
    result = _real_geometry(step, shape).result
    source, target = (program.activation() for _ in range(2))
    _add_real(program, step, Value(shape, outside=source), After(out=Value(result, outside=target)))
    out = torch.empty((len(x), *result), **FLOATS)
    Compiled(program)(runtime.chosen(), len(x), x.contiguous(memory_format=torch.channels_last), out)
    return out


class Segment(nn.Module):
    """A part of a network that the compiled instructions run: tensors (N, C, H, W) in and out, channels-last."""

    def __init__(
        self, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], steps: Steps
    ) -> None:
        super().__init__()
        lowering = Lowering({node: steps[node] for node in nodes}, outputs)
        for node in inputs:
            lowering.floats[node] = Value(_image(node), outside=lowering.program.activation())
        for chain in chains(nodes, steps):
            lowering.take(chain)
        self.order = [node for node in lowering.floats if node in outputs]  # as the program declared them
        self.shapes = [_image(node) for node in self.order]
        self.compiled = Compiled(lowering.program)

    def forward(self, *inputs: Tensor) -> Any:  # noqa: ANN401
        """One tensor, or as many as there are outputs."""
        images = len(inputs[0])
        # float: under autocast torch's layers between segments may give another type
        dense = [x.float().contiguous(memory_format=torch.channels_last) for x in inputs]
        outputs = [torch.empty((images, *shape), **FLOATS) for shape in self.shapes]
        self.compiled(runtime.chosen(), images, *dense, *outputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)
