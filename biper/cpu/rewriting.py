"""A network's training step on the CPU with fewer passes over memory: the same graph, rewritten around the kernels.

What stands between two convolutions, `hardtanh(norm(alpha * sums) + skip)` and the next layer's standardized sign, is
one unit. The rewritten graph computes with the network's own parameters and buffers, and keeps none of its own.
"""

import inspect
import logging
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from biper.cpu import functions as kernels
from biper.cpu.modules import Signs, Sums, Unit
from biper.errors import one_line
from biper.nn.layers import BinaryConv2d, RealConv2d, RealLinear, binary_layers
from biper.nn.losses import periodic_regularizer

log = logging.getLogger("biper")
Forward = Callable[[Tensor], Tensor]  # images (N, 3, H, W) to logits (N, classes)


class Tracer(fx.Tracer):
    """Our layers stay whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the tracer does not look inside."""
        return isinstance(m, BinaryConv2d | RealConv2d | RealLinear) or super().is_leaf_module(m, module_qualified_name)


@dataclass
class _Match:
    """A chain of nodes that becomes one unit: the convolution if it is binary, its sums, the skip, the last node."""

    layer: fx.Node | None
    sums: fx.Node
    skip: fx.Node | None
    clamp: bool
    last: fx.Node
    nodes: set[fx.Node]


class Rewriter:
    """Rewrites one network's graph, as it is in the network's mode. What it does not know stays as it is."""

    def __init__(self, network: nn.Module) -> None:
        self.modules = dict(network.named_modules())
        self.graph = Tracer().trace(network)
        self.owner = nn.Module()  # of the modules that the new graph calls
        self.units: dict[fx.Node, fx.Node] = {}  # by the node of their activations
        self.turned: dict[fx.Node, bool] = {}  # convolutions whose alpha is a unit's: is a maximum taken in between?
        self.replaced: set[fx.Node] = set()

    def rewritten(self) -> Forward:
        """The network's forward pass."""
        if any(node.op == "get_attr" for node in self.graph.nodes):
            raise ValueError("its forward pass uses parameters that are in no layer")
        for node in list(self.graph.nodes):
            if _served(norm := self._module(node)):
                self._fuse(node, norm)
        for node in list(self.turned):
            self._split(node)
        for node in reversed(self.graph.nodes):
            if not node.users and (node in self.replaced or node in self.units):
                if node in self.units:
                    self._unit(node).activations = False
                self.graph.erase_node(node)
        for node in self.graph.nodes:  # modules that stay as they are
            if node.op == "call_module" and not hasattr(self.owner, node.target):
                node.target = self._own(self.modules[node.target])
        return fx.GraphModule(self.owner, self.graph).forward

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _unit(self, activations: fx.Node) -> Unit:
        unit = getattr(self.owner, str(self.units[activations].target))
        assert isinstance(unit, Unit)
        return unit

    def _own(self, module: nn.Module) -> str:
        name = f"{type(module).__name__.lower()}{len(self.owner._modules)}"
        self.owner.add_module(name, module)
        return name

    def _match(self, node: fx.Node, source: fx.Node) -> _Match:
        sums = source
        if source.target is F.max_pool2d and isinstance(source.args[0], fx.Node) and len(source.users) == 1:
            source = source.args[0]
        ours = _fits(self._module(source)) and len(source.users) == 1
        match = _Match(source if ours else None, sums, None, False, node, {node})
        user = _only_user(match.last)
        if user and user.target in (operator.add, torch.add) and len(user.args) == 2 and not user.kwargs:
            others = [a for a in user.args if a is not node]
            if len(others) == 1 and isinstance(others[0], fx.Node):
                match.skip, match.last = others[0], user
                match.nodes.add(user)
        if (user := _only_user(match.last)) and is_plain_hardtanh(user):
            match.clamp, match.last = True, user
            match.nodes.add(user)
        return match

    def _fuse(self, node: fx.Node, norm: nn.BatchNorm2d) -> None:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return
        match = self._match(node, source)
        if any(mutates(user, self._module(user)) for user in match.last.users):
            return
        turned = match.layer is not match.sums
        layer = self._module(match.layer) if match.layer else None
        assert layer is None or isinstance(layer, BinaryConv2d)
        with self.graph.inserting_after(match.last):
            unit = self.graph.call_module(self._own(Unit(norm, layer, turned, match.clamp)))
        with self.graph.inserting_after(unit):
            activations = self.graph.call_function(operator.getitem, (unit, 0))
        match.last.replace_all_uses_with(activations)
        unit.args = (match.sums, match.skip) if match.skip else (match.sums,)
        self.units[activations] = unit
        self.replaced |= match.nodes
        if match.layer is not None:
            self.turned[match.layer] = turned

    def _split(self, node: fx.Node) -> None:
        """A binary convolution becomes its signs and its sums; alpha is the unit's."""
        layer, source = self._module(node), node.args[0]
        assert isinstance(layer, BinaryConv2d)
        assert isinstance(source, fx.Node)
        with self.graph.inserting_before(node):
            if source in self.units:
                self._unit(source).signs = True
                signs = self.graph.call_function(operator.getitem, (self.units[source], 1))
            else:
                signs = self.graph.call_module(self._own(Signs()), (source,))
            sums = self.graph.call_module(self._own(Sums(layer, self.turned[node])), (signs,))
        node.replace_all_uses_with(sums)
        self.replaced.add(node)


def mutates(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node, which calls that module if any, writes into what it is given."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_module":
        return bool(getattr(module, "inplace", False))
    if node.op != "call_function" or not callable(node.target):
        return False
    name = getattr(node.target, "__name__", "")
    try:
        given: Mapping[str, Any] = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):  # a function of C
        given = node.kwargs
    in_place = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
    underscored = name.endswith("_") and not name.endswith("__")
    return node.target in in_place or underscored or bool(given.get("inplace")) or given.get("out") is not None


def _untouched(module: nn.Module) -> bool:
    """Whether nobody watches the module being called."""
    return not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks


def _served(module: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
    """Whether it is a batch norm as the kernels know it."""
    if type(module) is not nn.BatchNorm2d or not module.affine or not module.track_running_stats:
        return False
    return module.momentum is not None and module.num_features % kernels.LANES == 0 and _untouched(module)


def _fits(module: nn.Module | None) -> bool:
    """Whether it is a binary layer as the kernels know it: binary activations, channels in sixteens."""
    if type(module) is not BinaryConv2d or not module.binary_activations or not _untouched(module):
        return False
    return not any(c % kernels.LANES for c in (module.in_channels, module.out_channels))


def is_plain_hardtanh(node: fx.Node) -> bool:
    """Whether a node is the hardtanh to [-1, 1], not in place."""
    given = dict(zip(("min_val", "max_val", "inplace"), node.args[1:], strict=False)) | node.kwargs
    plain = {"min_val": -1, "max_val": 1, "inplace": False}
    return node.target is F.hardtanh and plain | given == plain


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


class Fused:
    """A network's forward pass around the kernels: images (N, 3, H, W) to logits, differentiable in training.

    It takes the place of network.forward on the CPU, in float32 or under bfloat16 autocast. The graph is traced when a
    mode is first used; a network that cannot be traced says so in one line and runs as it is.
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
    """loss.periodic_regularizer for a model on the CPU, all its layers at once."""
    layers = [layer for _, layer in binary_layers(model)]
    if not layers or any(layer.weight.numel() % kernels.LANES for layer in layers):
        return periodic_regularizer(model, tau)
    return tau * kernels.mean_squared_sines([layer.weight for layer in layers], [layer.freq for layer in layers])


def fuse(network: nn.Module) -> Fused:
    """The network's forward pass around the kernels. Raises CompilerMissing where they cannot be compiled."""
    kernels.compiled_kernels()
    return Fused(network)
