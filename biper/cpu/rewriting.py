"""A network's training step on the CPU with fewer passes over memory: the same graph, rewritten around the kernels.

What stands between two convolutions, `activation(norm(alpha * sums) + skip)` and the next layer's signs, is one unit.
The rewritten graph computes with the network's own parameters and buffers, and keeps none of its own.
"""

import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, fx, nn

from biper.cpu import functions
from biper.cpu.modules import FUSED_ACTIVATIONS, FUSED_QUANTIZERS, BinarySums, KernelSigns, Signs, Unit
from biper.errors import one_line
from biper.nn.activations import RPReLU
from biper.nn.graph import Part, follow, is_plain_hardtanh, is_watched, module_of, mutates, other_addend, trace
from biper.nn.layers import BinaryConv2d
from biper.nn.losses import periodic_layers, periodic_regularizer
from biper.nn.quantizers import InputQuantizer

log = logging.getLogger("biper")
Forward = Callable[[Tensor], Tensor]  # images (N, 3, H, W) to logits (N, classes)
PARTS = ("conv", "maximum", "norm", "add", "activation")  # of a unit, in order


class Rewriter:
    """Rewrites one network's graph, as it is in the network's mode. What it does not know stays as it is."""

    def __init__(self, network: nn.Module) -> None:
        self.modules = dict(network.named_modules())
        self.graph = trace(network, (RPReLU,), (RPReLU,))
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
        norm = dict(chain).get("norm")
        if norm is not None:
            if other_addend(node, chain[-1][1]):
                yield "add"
            if self._activation(node, norm) is not None:
                yield "activation"

    def _activation(self, node: fx.Node, norm: fx.Node) -> nn.Module | None:
        """The activation that a node behind a batch norm is, if the kernels know it."""
        if is_plain_hardtanh(node):
            return nn.Hardtanh()
        module, normed = module_of(node, self.modules), module_of(norm, self.modules)
        if type(module) not in FUSED_ACTIVATIONS or not isinstance(module, nn.PReLU | RPReLU) or is_watched(module):
            return None
        assert isinstance(normed, nn.BatchNorm2d)
        return module if module.weight.numel() in (1, normed.num_features) else None

    def _fuse(self, chain: Sequence[Part]) -> None:
        """A chain with a batch norm becomes one unit."""
        parts = dict(chain)
        norm = module_of(parts["norm"], self.modules) if "norm" in parts else None
        last = chain[-1][1] if chain else None
        if not _served(norm) or last is None:
            return
        sums = parts["norm"].args[0] if parts["norm"].args else None
        skip = other_addend(parts["add"], parts["norm"]) if "add" in parts else None
        activation = self._activation(parts["activation"], parts["norm"]) if "activation" in parts else None
        kept = [last, skip] if isinstance(activation, nn.PReLU | RPReLU) else [last]
        if not isinstance(sums, fx.Node) or any(self._is_written(node) for node in kept if node):
            return
        layer = module_of(parts["conv"], self.modules) if "conv" in parts else None
        assert layer is None or isinstance(layer, BinaryConv2d)
        turned = "conv" not in parts or "maximum" in parts
        with self.graph.inserting_after(last):
            unit = self.graph.call_module(self._own(Unit(norm, layer, turned, activation)))
        with self.graph.inserting_after(unit):
            activations = self.graph.call_function(operator.getitem, (unit, 0))
        last.replace_all_uses_with(activations)
        unit.args = (sums, skip) if skip is not None else (sums,)
        self.units[activations] = unit
        self.replaced |= {node for part, node in chain if part in ("norm", "add", "activation")}
        if "conv" in parts:
            self.turned[parts["conv"]] = turned

    def _is_written(self, node: fx.Node) -> bool:
        """Whether somebody writes into a node's result, which the backward pass may need as it was."""
        return any(mutates(user, module_of(user, self.modules)) for user in node.users)

    def _split(self, node: fx.Node) -> None:
        """A binary convolution becomes its signs and its sums; alpha is the unit's."""
        layer, source = module_of(node, self.modules), node.args[0]
        assert isinstance(layer, BinaryConv2d)
        assert isinstance(source, fx.Node)
        with self.graph.inserting_before(node):
            signs = self._signs(layer, source)
            sums = self.graph.call_module(self._own(BinarySums(layer, self.turned[node])), (signs,))
        node.replace_all_uses_with(sums)
        self.replaced.add(node)

    def _signs(self, layer: BinaryConv2d, source: fx.Node) -> fx.Node:
        """Signs come from the unit before, if there is one and it gives no others; torch computes unknown ones."""
        quantizer = layer.input_quantizer
        assert quantizer is not None
        if type(quantizer) not in FUSED_QUANTIZERS or is_watched(quantizer):
            return self.graph.call_module(self._own(Signs(layer)), (source,))
        unit = self._unit(source) if source in self.units else None
        if unit is None or not (unit.quantizer is None or _agree(unit.quantizer, quantizer)):
            return self.graph.call_module(self._own(KernelSigns(quantizer)), (source,))
        unit.quantizer = unit.quantizer or quantizer
        return self.graph.call_function(operator.getitem, (self.units[source], 1))


def _agree(one: InputQuantizer, other: InputQuantizer) -> bool:
    """Whether two quantizers that the kernels know give the same signs and gradients, and always will."""
    if one is other:
        return True
    state = [*one.parameters(), *one.buffers(), *other.parameters(), *other.buffers()]
    same = type(one) is type(other) and one.settings() == other.settings() and one.training == other.training
    return same and not state


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
