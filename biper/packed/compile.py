"""A packed network's graph, cut into segments that the compiled instructions run and the layers that torch runs."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from biper.nn.activations import RPReLU
from biper.nn.graph import module_of, mutates, trace
from biper.nn.layers import RealConv2d
from biper.packed.fields import LANES
from biper.packed.layers import FoldedNorm, PackedConv2d, PackedLinear
from biper.packed.lowering import FLOATS, Segment, real_convolution
from biper.packed.program import IN_TURN, SumOrder
from biper.packed.simplify import simplify
from biper.packed.steps import Step, Steps, known, shape_of

WHOLE = (PackedConv2d, PackedLinear, FoldedNorm, nn.PReLU, RPReLU)  # layers that stay whole; they give new tensors
MEANS = (F.adaptive_avg_pool2d, torch.mean, "mean")  # which add up in another order where channels come last
FEW = 16  # images of which as many are taken at a time at least
PRODUCTS = 256  # of a real convolution's sum, at most, that is not left to torch
Forward = Callable[[Tensor], Tensor]  # images (N, 3, H, W) to logits (N, classes)


class Shapes(fx.Interpreter):
    """Notes the shape of every node's tensor. (torch's own pass for it loads a second's worth of modules.)"""

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        """The node's value."""
        result = super().run_node(n)
        n.meta["shape"] = tuple(result.shape) if isinstance(result, Tensor) else ()
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """What a module gives; of a packed convolution its shape alone."""
        module = self.fetch_attr(target)
        if not isinstance(module, PackedConv2d):
            return super().call_module(target, args, kwargs)
        shape = len(args[0]), module.out_channels, *module.output_sides(args[0].shape)
        return torch.empty(shape, **FLOATS).zero_()


def traced(network: nn.Module) -> fx.Graph:
    """A packed network's graph. Raises what torch.fx raises."""
    return trace(network, leaves=WHOLE, fresh=WHOLE)


class Segmented:
    """A packed network's forward pass for images of one size. Raises ValueError for a graph that cannot be cut.

    graph: the network's, as `traced` gives it; it is changed here.
    """

    def __init__(self, network: nn.Module, graph: fx.Graph, example: Tensor) -> None:
        self.modules = dict(network.named_modules())
        Shapes(fx.GraphModule(network, graph)).run(example)
        if any(node.op == "get_attr" or mutates(node, self._module(node)) for node in graph.nodes):
            raise ValueError("its forward pass writes into what it is given, or uses parameters that are in no layer")
        batches = {shape_of(n)[:1] for n in graph.nodes if len(shape_of(n)) == 4 or n.op == "output"}
        if batches != {(len(example),)} or any(_couples(module) for module in self.modules.values()):
            raise ValueError("it does not treat images one by one")
        simplify(graph, self.modules)
        self.steps: Steps = {n: s for n in graph.nodes if (s := known(n, self._module(n)) or self._real(n))}
        self.graph, self.owner = fx.Graph(), nn.Module()
        self.new: dict[fx.Node, fx.Node] = {}
        self._rebuild(list(graph.nodes))
        self.largest = max(4 * torch.Size(shape_of(node)[1:]).numel() for node in self.new)  # bytes of an image's
        self.forward: Forward = fx.GraphModule(self.owner, self.graph).forward

    def _module(self, node: fx.Node) -> nn.Module | None:
        return module_of(node, self.modules)

    def _real(self, node: fx.Node) -> Step | None:
        """A small convolution of real values, as a network's first is, if the instructions give torch's very sums.

        In which order torch adds up depends on sizes, layout and threads: all orders that are known are tried.
        """
        module = self._module(node)
        if not isinstance(module, nn.Conv2d) or not _is_small(module) or len(shape_of(node)) != 4:
            return None
        images, *rest = shape_of(node.all_input_nodes[0])
        batches = (images,) if images == 1 else (images, FEW)  # torch's order may be another one for many images
        examples = [(x, module(x)) for x in (_noise((count, *rest)) for count in batches)]
        for order in _orders(module):
            step = Step("real", module, order=order)
            if all(torch.equal(real_convolution(step, x), expected) for x, expected in examples):
                return step
        return None

    def _rebuild(self, waiting: list[fx.Node]) -> None:
        """Torch's layers as early as they can run, and what runs between two of them as one segment."""
        done: set[fx.Node] = set()
        last = waiting.pop()  # the output
        while waiting:
            for node in self._ready(waiting, done, ours=False):
                self._copy(node)
            if segment := self._ready(waiting, done, ours=True):
                self._cut(segment)
        self._copy(last)

    def _ready(self, waiting: list[fx.Node], done: set[fx.Node], ours: bool) -> list[fx.Node]:
        """Take those that can run now, one behind the other; of ours until one of torch's can."""
        taken = []
        for node in list(waiting):
            if (node in self.steps) == ours and done.issuperset(node.all_input_nodes):
                waiting.remove(node)
                done.add(node)
                taken.append(node)
                torchs = [user for user in node.users if user not in self.steps and user in waiting]
                if ours and any(done.issuperset(user.all_input_nodes) for user in torchs):
                    break
        return taken

    def _copy(self, node: fx.Node) -> None:
        module = self._module(node)
        if isinstance(module, nn.Conv2d):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            layout = self._layout(module, shape_of(source))
            x = self.graph.call_function(_arranged, (self.new[source], layout))
            self.new[node] = self.graph.call_module(self._own(module), (x,))
            return
        given = dict(self.new)
        if node.target in MEANS or isinstance(module, nn.AdaptiveAvgPool2d):
            source = node.all_input_nodes[0]
            given[source] = self.graph.call_function(_arranged, (self.new[source], torch.contiguous_format))
        self.new[node] = self.graph.node_copy(node, given.__getitem__)
        if (node.op, node.target) == ("call_method", "view"):
            self.new[node].target = "reshape"  # segments give channels-last, which cannot be viewed otherwise
        if module is not None:
            self.new[node].target = self._own(module)

    def _layout(self, conv: nn.Conv2d, shape: tuple[int, ...]) -> torch.memory_format:
        """Channels-last, which is faster and what segments give, unless the convolution adds up in another order then.

        The difference would be of the last digit, but a sign makes much of it.
        """
        x = _noise(shape)
        same = torch.equal(conv(x), conv(_arranged(x, torch.channels_last)))
        return torch.channels_last if same else torch.contiguous_format

    def _own(self, module: nn.Module) -> str:
        name = f"{type(module).__name__.lower()}{len(self.owner._modules)}"
        self.owner.add_module(name, module)
        return name

    def _cut(self, nodes: list[fx.Node]) -> None:
        members = set(nodes)
        inputs = dict.fromkeys(a for node in nodes for a in node.all_input_nodes if a not in members)
        outputs = [node for node in nodes if any(user not in members for user in node.users)]
        segment = Segment(nodes, list(inputs), outputs, self.steps)
        call = self.graph.call_module(self._own(segment), tuple(self.new[node] for node in inputs))
        for number, node in enumerate(segment.order):
            several = len(segment.order) > 1
            self.new[node] = self.graph.call_function(_item, (call, number)) if several else call


def _couples(module: nn.Module) -> bool:
    """Whether a layer looks at the whole batch, in evaluation too."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None


def _is_small(conv: nn.Conv2d) -> bool:
    """Whether the instructions know a real convolution, and its products are few: then they are as fast as torch."""
    products = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
    plain = type(conv) in (nn.Conv2d, RealConv2d) and conv.groups == 1 and conv.dilation == (1, 1)
    zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and conv.bias is None
    dense = conv.weight.is_contiguous() and conv.weight.dtype == torch.float32
    return plain and zeros and dense and products <= PRODUCTS


def _orders(conv: nn.Conv2d) -> Iterator[SumOrder]:
    """The orders of sums that torch's convolutions are known to have: those of one tap may be in chunks."""
    yield IN_TURN
    if conv.kernel_size == (1, 1):
        yield from (SumOrder(chunk=chunk) for chunk in range(LANES, conv.in_channels, LANES))
    else:
        yield SumOrder(channels_first=True)


def _noise(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")


def _arranged(x: Tensor, layout: torch.memory_format) -> Tensor:
    """x (N, C, ...) in a layout, by its strides too: one pixel alone is in both, but torch goes by the strides."""
    last = layout is torch.channels_last
    pixels = x.permute(0, 2, 3, 1) if last else x
    dense = pixels.flatten(1).view(pixels.shape)
    return dense.permute(0, 3, 1, 2) if last else dense


def _item(values: tuple[Tensor, ...], number: int) -> Tensor:
    return values[number]
