"""A network's training step on the CPU with fewer passes over memory: the same graph, rewritten around the kernels.

What stands between two convolutions, `hardtanh(norm(alpha * sums) + skip)` and the next layer's standardized sign, is
one unit. The rewritten graph computes with the network's own parameters and buffers, and keeps none of its own.
"""

import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, fx, nn

from biper.cpu import functions
from biper.cpu.modules import BiperSigns, Signs, Sums, Unit
from biper.errors import one_line
from biper.nn.graph import Part, follow, is_plain_hardtanh, is_watched, module_of, mutates, other_addend, trace
from biper.nn.layers import BinaryConv2d
from biper.nn.losses import periodic_layers, periodic_regularizer
from biper.nn.quantizers import PolynomialSign

log = logging.getLogger("biper")
Forward = Callable[[Tensor], Tensor]  # images (N, 3, H, W) to logits (N, classes)
PARTS = ("conv", "maximum", "norm", "add", "hardtanh")  # of a unit, in order


class Rewriter:
    """Rewrites one network's graph, as it is in the network's mode. What it does not know stays as it is."""

    def __init__(self, network: nn.Module) -> None:
        self.modules = dict(network.named_modules())
        self.graph = trace(network)
        self.owner = nn.Module()  # of the modules that the new graph calls
        self.units: dict[fx.Node, fx.Node] = {}  # by the node of their activations
        self.turned: dict[fx.Node, bool] = {}  # convolutions whose alpha is a unit's: is a maximum taken in between?
        self.replaced: set[fx.Node] = set()

    def rewritten(self) -> Forward:
        """The network's forward pass."""
        if any(node.op == "get_attr" for node in self.graph.nodes):
            raise ValueError("its forward pass uses parameters that are in no layer")
        for node in list(self.graph.nodes):
            if node not in self.replaced:
                self._fuse(follow(node, PARTS, self._parts_of))
        for node in list(self.turned):
            self._split(node)
        for node in reversed(self.graph.nodes):
            if not node.users and (node in self.replaced or node in self.units):
                if node in self.units:
                    self._unit(node).activations = False
                self.graph.erase_node(node)
        for node in self.graph.nodes:  # modules that stay as they are
            if node.op == "call_module" and not hasattr(self.owner, str(node.target)):
                node.target = self._own(self.modules[str(node.target)])
        return fx.GraphModule(self.owner, self.graph).forward

    def _unit(self, activations: fx.Node) -> Unit:
        unit = getattr(self.owner, str(self.units[activations].target))
        assert isinstance(unit, Unit)
        return unit

    def _own(self, module: nn.Module) -> str:
        name = f"{type(module).__name__.lower()}{len(self.owner._modules)}"
        self.owner.add_module(name, module)
        return name

    def _parts_of(self, node: fx.Node, chain: Sequence[Part]) -> Iterator[str]:
        module = module_of(node, self.modules)
        if _fits(module):
            yield "conv"
        if node.target is F.max_pool2d and chain:  # of sums alone: without a convolution it is torch's
            yield "maximum"
        if _served(module):
            yield "norm"
        if "norm" in dict(chain):
            if other_addend(node, chain[-1][1]):
                yield "add"
            if is_plain_hardtanh(node):
                yield "hardtanh"

    def _fuse(self, chain: Sequence[Part]) -> None:
        """A chain with a batch norm becomes one unit."""
        parts = dict(chain)
        norm = module_of(parts["norm"], self.modules) if "norm" in parts else None
        last = chain[-1][1] if chain else None
        if not _served(norm) or last is None:
            return
        sums = parts["norm"].args[0] if parts["norm"].args else None
        if not isinstance(sums, fx.Node) or any(mutates(u, module_of(u, self.modules)) for u in last.users):
            return
        layer = module_of(parts["conv"], self.modules) if "conv" in parts else None
        assert layer is None or isinstance(layer, BinaryConv2d)
        turned, clamp = "conv" not in parts or "maximum" in parts, "hardtanh" in parts
        skip = other_addend(parts["add"], parts["norm"]) if "add" in parts else None
        with self.graph.inserting_after(last):
            unit = self.graph.call_module(self._own(Unit(norm, layer, turned, clamp)))
        with self.graph.inserting_after(unit):
            activations = self.graph.call_function(operator.getitem, (unit, 0))
        last.replace_all_uses_with(activations)
        unit.args = (sums, skip) if skip is not None else (sums,)
        self.units[activations] = unit
        self.replaced |= {node for part, node in chain if part in ("norm", "add", "hardtanh")}
        if "conv" in parts:
            self.turned[parts["conv"]] = turned

    def _split(self, node: fx.Node) -> None:
        """A binary convolution becomes its signs and its sums; alpha is the unit's."""
        layer, source = module_of(node, self.modules), node.args[0]
        assert isinstance(layer, BinaryConv2d)
        assert isinstance(source, fx.Node)
        with self.graph.inserting_before(node):
            signs = self._signs(layer, source)
            sums = self.graph.call_module(self._own(Sums(layer, self.turned[node])), (signs,))
        node.replace_all_uses_with(sums)
        self.replaced.add(node)

    def _signs(self, layer: BinaryConv2d, source: fx.Node) -> fx.Node:
        """BiPer's signs come from the unit before if there is one; other quantizers are torch's to compute."""
        quantizer = layer.input_quantizer
        assert quantizer is not None
        if type(quantizer) is not PolynomialSign or not quantizer.standardized or is_watched(quantizer):
            return self.graph.call_module(self._own(Signs(layer)), (source,))
        if source not in self.units:
            return self.graph.call_module(self._own(BiperSigns()), (source,))
        self._unit(source).signs = True
        return self.graph.call_function(operator.getitem, (self.units[source], 1))


def _served(module: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
    """Whether it is a batch norm as the kernels know it."""
    if type(module) is not nn.BatchNorm2d or not module.affine or not module.track_running_stats:
        return False
    return module.momentum is not None and module.num_features % functions.LANES == 0 and not is_watched(module)


def _fits(module: nn.Module | None) -> bool:
    """Whether it is a binary layer as the kernels know it: binary inputs, no bias, channels in sixteens."""
    if type(module) is not BinaryConv2d or module.input_quantizer is None or module.bias is not None:
        return False
    channels = (module.in_channels, module.out_channels)
    watched = any(is_watched(m) for m in (module, module.weight_quantizer))
    return not watched and not any(c % functions.LANES for c in channels)


class Fused:
    """A network's forward pass around the kernels: images (N, 3, H, W) to logits, differentiable in training.

    It takes the place of network.forward on the CPU, in float32 or under bfloat16 autocast. The graph is traced when a
    mode is first used: weight quantizers may change later, input quantizers and layers that come in the place of others
    are not seen. A network that cannot be traced says so in one line and runs as it is.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.forwards: dict[bool, Forward] = {}  # by mode: training or evaluation

    def __call__(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) -> (N, classes)."""
        mode = self.network.training
        if mode not in self.forwards:
            self.forwards[mode] = self._rewritten()
        return self.forwards[mode](images)

    def _rewritten(self) -> Forward:
        try:
            return Rewriter(self.network).rewritten()
        except Exception as error:  # whatever a network of somebody's own may do
            log.warning("no fused kernels for this network, so this is slower: %s", one_line(error))
            return self.network


def fused_regularizer(model: nn.Module, tau: float) -> Tensor:
    """losses.periodic_regularizer for a model on the CPU, all its layers at once."""
    layers, freqs = periodic_layers(model)
    if not layers or any(layer.weight.numel() % functions.LANES for layer in layers):
        return periodic_regularizer(model, tau)
    return tau * functions.mean_squared_sines([layer.weight for layer in layers], freqs)


def fuse(network: nn.Module) -> Fused:
    """The network's forward pass around the kernels. Raises CompilerMissing where they cannot be compiled."""
    functions.compiled_kernels()
    return Fused(network)
