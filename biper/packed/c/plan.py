"""A packed network as a sequence of calls of C's kernels, and where in one block of memory its activations lie."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from biper.errors import UsageError, one_line
from biper.nn.activations import RPReLU
from biper.nn.graph import Part, described, follow, is_plain_hardtanh, is_watched, module_of, mutates, trace
from biper.nn.layers import RealConv2d, RealLinear
from biper.packed.compile import WHOLE, Shapes
from biper.packed.layers import FoldedNorm, PackedConv2d, PackedLinear
from biper.packed.network import PackedNetwork
from biper.packed.program import Value, placed
from biper.packed.steps import Step, given, known, shape_of

LAYERS = (PackedConv2d, PackedLinear, nn.Conv2d, nn.Linear, RealConv2d, RealLinear)  # these themselves
RELUS = (F.relu, torch.relu, "relu")
FLATTENINGS = (torch.flatten, "flatten", "view", "reshape", torch.reshape)
MEANS = (F.adaptive_avg_pool2d, torch.mean, "mean", F.avg_pool2d)
ORDERS = (["layer", "pool", "norm", "add", "activation"], ["norm", "add", "activation", "maximum"])
NUMBER_BYTES = {"float32": 4, "int16": 2, "int8": 1}  # that a map stores, by its kind
Signs = tuple[fx.Node, nn.Module | None]  # whose, and the layer whose thresholds they have; None: they are 0


@dataclass(eq=False)
class Map(Value):
    """A value in C: numbers of a kind, or bits in words of 32 for each pixel."""

    kind: str = "float32"

    @property
    def size(self) -> int:
        """Bytes."""
        c, h, w = self.shape
        return h * w * (4 * -(-c // 32) if self.bits else NUMBER_BYTES[self.kind] * c)


@dataclass
class KernelCall:
    """One call of a kernel. kind: binary, real, mixed, pointwise, maximum, average or flatten."""

    kind: str
    source: fx.Node
    nodes: list[fx.Node]
    layer: nn.Module | None = None
    pool: bool = False
    norm: FoldedNorm | None = None
    skip: fx.Node | None = None
    activation: Step | None = None
    window: tuple[int, int, int, int] = (1, 1, 1, 0)  # height, width, stride, padding
    front: int = 0
    copies: int = 1
    reads: Map | None = None
    adds: Map | None = None  # the skip
    out: Map | None = None
    bits: Map | None = None
    threshold: Tensor | None = None  # of the bits

    @property
    def last(self) -> fx.Node:
        """Whose value it gives."""
        return self.nodes[-1]


@dataclass
class Plan:
    """What a network's C does: the calls in order, the maps' offsets in the arena, and its size in bytes."""

    network: nn.Module
    calls: list[KernelCall]
    image: Map
    logits: Map
    offsets: dict[Map, int] = field(default_factory=dict)
    arena: int = 0


class Numbers(Shapes):
    """Notes what numbers a graph computes of shapes, beside the shapes themselves, and what gives its own input."""

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        """The node's value."""
        result = super().run_node(n)
        n.meta["value"] = None if isinstance(result, Tensor) else result
        n.meta["same"] = [source for source in n.all_input_nodes if self.env.get(source) is result]
        return result


def plan(packed: PackedNetwork, image_size: int, kind: str = "float32") -> Plan:
    """The calls for images (3, image_size, image_size), their maps stored as `kind`: float32, int16 or int8.

    Raises UsageError for a network with a layer that C does not know; it is named.
    """
    network = packed.network
    try:
        graph = trace(network, leaves=WHOLE, fresh=WHOLE)
        example = torch.zeros(1, 3, image_size, image_size)
        with torch.no_grad():
            Numbers(fx.GraphModule(network, graph)).run(example)
    except UsageError:
        raise
    except Exception as error:  # whatever a network of somebody's own may do
        raise UsageError(f"this network cannot be written as C: {one_line(error)}") from error
    return _Planner(network, graph, kind).plan()


class _Planner:
    """One network's plan under construction."""

    def __init__(self, network: nn.Module, graph: fx.Graph, kind: str) -> None:
        self.network, self.graph, self.kind = network, graph, kind
        self.modules = dict(network.named_modules())
        self._remove_what_changes_nothing()
        self.steps = {node: self._step(node) for node in graph.nodes if shape_of(node) and _computes(node)}
        self.floats: dict[fx.Node, Map] = {}
        self.signs: dict[Signs, Map] = {}
        self.calls: list[KernelCall] = []

    def plan(self) -> Plan:
        """All of it."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder" and node.users]
        outputs = next(node for node in self.graph.nodes if node.op == "output").all_input_nodes
        if len(inputs) != 1 or len(outputs) != 1:
            raise UsageError("C takes one image and gives one tensor: this network takes or gives several")
        if _image(outputs[0])[1:] != (1, 1) or len(shape_of(outputs[0])) == 3 or outputs[0] is inputs[0]:
            raise UsageError(f"C gives logits (N, classes): this network gives {shape_of(outputs[0])} for one image")
        image, result = inputs[0], outputs[0]
        self.floats[image] = Map(_image(image))
        for call in self._ordered():
            self._take(call, result)
        made = Plan(self.network, self.calls, self.floats[image], self.floats[result])
        made.offsets, made.arena = _laid_out(made)
        return made

    def _module(self, node: fx.Node) -> nn.Module | None:
        return module_of(node, self.modules)

    def _remove_what_changes_nothing(self) -> None:
        """Nodes that give their own input, and flattenings that leave numbers where they are."""
        for node in list(self.graph.nodes):
            module, same = self._module(node), node.meta.get("same", [])
            if _flattens(node, module) and _same_order(node.all_input_nodes[0], node):
                same = node.all_input_nodes[:1]
            if same and node.op != "output" and not mutates(node, module):
                node.replace_all_uses_with(same[0])
                self.graph.erase_node(node)

    def _step(self, node: fx.Node) -> Step:
        """What a node is to C. Raises UsageError if it is nothing that C knows."""
        module = self._module(node)
        step = known(node, module) or _known_in_c(node, module)
        alone = shape_of(node)[0] == 1 and all(_computes(n) or n.op == "placeholder" for n in node.all_input_nodes)
        if step is None or mutates(node, module) or not alone or (module is not None and is_watched(module)):
            raise UsageError(f"C has no kernel for {described(node, module)}: this network cannot be written as C")
        return Step("layer", module) if step.kind == "conv" else step

    def _ordered(self) -> list[KernelCall]:
        """The calls in an order in which they can run."""
        free, found = set(self.steps), []
        place = {node: i for i, node in enumerate(self.graph.nodes)}
        for node in self.graph.nodes:
            if node in free:
                call = self._call(node, free)
                free.difference_update(call.nodes)
                found.append(call)
        return sorted(found, key=lambda call: place[call.last])

    def _call(self, start: fx.Node, free: set[fx.Node]) -> KernelCall:
        """The node and what of the free ones follows it alone."""
        kind = self.steps[start].kind
        call = KernelCall(_kernel(self.steps[start]), start.all_input_nodes[0], [])
        order = ORDERS[0] if kind == "layer" else ORDERS[1]
        if kind in ("average", "pad"):
            order = ["average", "pad"]
        elif kind in ("repeat", "flatten"):
            order = [kind]

        def parts_of(node: fx.Node, so_far: Sequence[Part]) -> list[str]:
            return self._parts(node, so_far) if node in free else []

        for part, node in follow(start, order, parts_of):
            _extend(call, node, self.steps[node], part)
        return call

    def _parts(self, node: fx.Node, so_far: Sequence[Part]) -> list[str]:
        """Which parts of a call a node can be, behind those so far."""
        step, parts = self.steps[node], dict(so_far)
        if step.kind != "maximum":
            return [step.kind]
        layer = self.steps[parts["layer"]].module if "layer" in parts else None
        if layer is not None:  # the maximum of sums of signs, before anything else happens to them
            return ["pool"] if step.window == (2, 2, 0) and reads_signs(layer) and len(so_far) == 1 else []
        return [] if "add" in parts else ["maximum"]

    def _take(self, call: KernelCall, result: fx.Node) -> None:
        """Add a call and decide what it gives: numbers, bits, or both."""
        node = call.last
        readers = [user for user in node.users if user in self.steps and reads_signs(self._module(user))]
        wanted = list(dict.fromkeys(_signs(node, self._module(user)) for user in readers))
        can = call.kind not in ("average", "flatten")
        if len(readers) < len(node.users) or len(wanted) != 1 or not can:
            small = _image(node)[1:] == (1, 1) or node is result
            call.out = self.floats[node] = Map(_image(node), kind="float32" if small else self.kind)
        if wanted and can:
            self._want(call, wanted[0])
        layer = call.layer
        call.reads = self._bits(_signs(call.source, layer)) if reads_signs(layer) else self.floats[call.source]
        call.adds = None if call.skip is None else self.floats[call.skip]
        self.calls.append(call)

    def _bits(self, signs: Signs) -> Map:
        if signs not in self.signs:
            call = KernelCall("pointwise", signs[0], [signs[0]], reads=self.floats[signs[0]])
            self._want(call, signs)
            self.calls.append(call)
        return self.signs[signs]

    def _want(self, call: KernelCall, signs: Signs) -> None:
        """Let a call write signs."""
        node, layer = signs
        call.bits = self.signs[signs] = Map(_image(node), bits=True)
        call.threshold = None if layer is None else layer.threshold.flatten()  # type: ignore[operator]


def _laid_out(plan: Plan) -> tuple[dict[Map, int], int]:
    """Offsets in the arena, and its size. What is added to a skip takes its place, where nobody needs it later."""
    for number, call in enumerate(plan.calls):
        for value in (call.reads, call.adds, call.out, call.bits):
            if value is not None:
                value.first = min(value.first, number) if value.last else number
                value.last = number + 1
    root: dict[Map, Map] = {}  # the map whose place a map takes
    for number, call in enumerate(plan.calls):
        old, new = call.adds or (call.reads if call.kind == "pointwise" else None), call.out
        if old is None or new is None or new is plan.logits or old is plan.image:
            continue
        windows = root.get(call.reads, call.reads) if call.reads and call.kind != "pointwise" else None
        if windows is root.get(old, old):
            continue  # they are still read when its first pixels are written
        if old.last == number + 1 and (old.shape, old.kind, old.bits) == (new.shape, new.kind, new.bits):
            root[new] = root.get(old, old)
    for new, old in root.items():
        old.last = max(old.last, new.last)
    values = [v for call in plan.calls for v in (call.reads, call.out, call.bits) if v is not None]
    own = [v for v in dict.fromkeys(values) if v not in root and v is not plan.logits]
    offsets, size = placed(own)
    return offsets | {new: offsets[old] for new, old in root.items()}, size


def reads_signs(module: nn.Module | None) -> bool:
    """Whether a layer is one of signs."""
    return isinstance(module, PackedConv2d | PackedLinear) and module.binary_activations


def _signs(node: fx.Node, layer: nn.Module | None) -> Signs:
    return node, None if getattr(layer, "threshold", None) is None else layer


def _computes(node: fx.Node) -> bool:
    return node.op not in ("placeholder", "output", "get_attr")


def _image(node: fx.Node) -> tuple[int, int, int]:
    """Channels, height and width; of features, one pixel."""
    c, h, w = (*shape_of(node)[1:], 1, 1)[:3]
    return c, h, w


def _same_order(source: fx.Node, node: fx.Node) -> bool:
    """Whether a flattening leaves numbers where they are when channels come last."""
    before, after = shape_of(source), shape_of(node)
    return len(after) == 2 and (before == after or (len(before) == 4 and before[2:] == (1, 1)))


def _kernel(step: Step) -> str:
    if step.kind != "layer":
        kinds = {"average": "average", "pad": "average", "repeat": "average", "flatten": "flatten"}
        return kinds.get(step.kind, "pointwise")
    if reads_signs(step.module):
        return "binary"
    return "mixed" if isinstance(step.module, PackedConv2d | PackedLinear) else "real"


def _extend(call: KernelCall, node: fx.Node, step: Step, part: str) -> None:
    """Make a node a part of a call."""
    if part == "layer":
        call.layer = step.module
    elif part == "norm":
        assert isinstance(step.module, FoldedNorm)
        call.norm = step.module
    elif part == "add":
        before = call.last if call.nodes else call.source
        call.skip = next(a for a in node.args if isinstance(a, fx.Node) and a is not before)
    elif part == "activation":
        call.activation = step
    elif part == "maximum":
        (size, stride, pad), call.kind = step.window, "maximum"
        call.window = size, size, stride, pad
    elif part == "average":
        sides = node.meta.get("window") or step.window[:1] * 2
        call.window = *sides, 1, 0
    call.pool |= part == "pool"
    call.front += step.front
    call.copies *= step.copies
    call.nodes.append(node)


def _known_in_c(node: fx.Node, module: nn.Module | None) -> Step | None:
    """What C makes of a node that the compiled instructions leave to torch."""
    if not node.all_input_nodes:
        return None
    if type(module) in LAYERS:
        return Step("layer", module) if _plain(module, node.all_input_nodes[0]) else None
    if isinstance(module, FoldedNorm):
        return Step("norm", module)
    if type(module) in (nn.PReLU, RPReLU):
        return Step("activation", module)
    if _is_one_of(node, RELUS) or type(module) is nn.ReLU:
        return Step("activation", nn.ReLU())
    if is_plain_hardtanh(node):
        return Step("activation")
    if node.target in (operator.add, torch.add):
        shapes = [shape_of(a) for a in node.args if isinstance(a, fx.Node)]
        return Step("add") if len(set(node.args)) == 2 and shapes == [shape_of(node)] * 2 and not node.kwargs else None
    if _flattens(node, module):
        whole = shape_of(node) == (1, torch.Size(shape_of(node.all_input_nodes[0])).numel())
        return Step("flatten") if whole else None
    if _is_one_of(node, MEANS) or type(module) is nn.AdaptiveAvgPool2d:
        return _mean(node)
    return None


def _is_one_of(node: fx.Node, targets: tuple[object, ...]) -> bool:
    """Whether a node calls one of some functions and methods; the name of a module may be any."""
    return node.op != "call_module" and node.target in targets


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    return _is_one_of(node, FLATTENINGS) or type(module) is nn.Flatten


def _plain(module: nn.Module | None, source: fx.Node) -> bool:
    """Whether a convolution pads with zeros, by numbers; a linear layer must be of features alone."""
    if isinstance(module, nn.Linear | PackedLinear):
        return _image(source)[1:] == (1, 1) and len(shape_of(source)) in (2, 4)
    return not isinstance(module, nn.Conv2d) or (module.padding_mode == "zeros" and not isinstance(module.padding, str))


def _mean(node: fx.Node) -> Step | None:
    """The mean over whole channels."""
    source = node.all_input_nodes[0]
    c, height, width = _image(source)
    if len(shape_of(source)) != 4 or _image(node) != (c, 1, 1):
        return None
    if _is_one_of(node, (torch.mean, "mean")):
        dims = given(node, ("dim", "keepdim", "dtype"))
        axes = dims.get("dim")
        if not isinstance(axes, list | tuple) or {d % 4 for d in axes} != {2, 3} or dims.get("dtype") is not None:
            return None
    elif _is_one_of(node, (F.avg_pool2d,)):
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        pool = fx.node.map_arg(given(node, names), lambda n: n.meta["value"])
        size = pool["kernel_size"]
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        padding = pool.get("padding") or 0
        if sides != (height, width) or padding not in (0, (0, 0)) or pool.get("divisor_override"):
            return None
    node.meta["window"] = height, width
    return Step("average")
