"""A network's training step on the CPU with fewer passes over memory: the same graph, rewritten around the kernels.

What stands between two convolutions, `hardtanh(norm(alpha * sums) + skip)` and the next layer's standardized sign, is
one unit. The rewritten graph computes with the network's own parameters and buffers, and keeps none of its own.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from biper import kernels
from biper.layers import BinaryConv2d, RealConv2d, RealLinear, binary_layers
from biper.loss import periodic_regularizer


class Tracer(fx.Tracer):
    """Our layers stay whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the tracer does not look inside."""
        return isinstance(m, BinaryConv2d | RealConv2d | RealLinear) or super().is_leaf_module(m, module_qualified_name)


class Sums(nn.Module):
    """A binary convolution from signs to sums, before alpha, in the type of the signs."""

    def __init__(self, layer: BinaryConv2d, turned: bool) -> None:
        super().__init__()
        self.layer, self.turned = layer, turned

    def forward(self, s: Tensor) -> Tensor:
        """s: (N, C_in, H, W) -> (N, C_out, H', W')."""
        layer = self.layer
        w = kernels.weights(layer.weight, layer.freq, layer.stage, s.dtype)
        if self.turned:  # so that a maximum taken of the sums is the one that alpha's sign would choose
            w = w * torch.where(layer.alpha < 0, -1.0, 1.0).to(w.dtype)[..., None]  # (C_out, 1, 1, 1)
        return F.conv2d(s, w, None, layer.stride, layer.padding, groups=layer.groups)


class Unit(nn.Module):
    """alpha, batch norm, skip, hardtanh and sign, as far as they are there."""

    def __init__(self, norm: nn.BatchNorm2d, layer: BinaryConv2d | None, turned: bool, clamp: bool) -> None:
        super().__init__()
        self.norm, self.layer, self.turned, self.clamp = norm, layer, turned, clamp
        self.signs, self.activations = False, True

    def forward(self, u: Tensor, skip: Tensor | None = None) -> kernels.Outputs:
        """u, skip: (N, C, H, W) -> activations, signs."""
        alpha: Tensor | None = self.layer.alpha if self.layer else None
        if alpha is not None and self.turned:
            alpha = alpha.abs()
        wanted = {"signs": self.signs, "activations": self.activations}
        return kernels.unit(u, alpha, self.norm, skip, clamp=self.clamp, **wanted)


class Signs(nn.Module):
    """The standardized sign of activations that no unit made, in the type that autocast asks for."""

    def forward(self, a: Tensor) -> Tensor:
        """a: (N, C, H, W), and so is what comes out."""
        return kernels.standardized_signs(a, torch.bfloat16 if torch.is_autocast_enabled("cpu") else a.dtype)


@dataclass
class _Match:
    """A chain of nodes that becomes one unit: the convolution if it is binary, the skip, the last node."""

    layer: fx.Node | None
    sums: fx.Node
    skip: fx.Node | None
    clamp: bool
    last: fx.Node


class Rewriter:
    """Rewrites one network's graph."""

    def __init__(self, network: nn.Module) -> None:
        self.modules = dict(network.named_modules())
        self.graph = Tracer().trace(network)
        self.owner = nn.Module()  # of the modules that the new graph calls
        self.units: dict[fx.Node, fx.Node] = {}  # by the node of their activations

    def rewritten(self) -> Callable[[Tensor], Tensor]:
        """The network's forward pass."""
        for node in list(self.graph.nodes):
            if isinstance(norm := self._module(node), nn.BatchNorm2d) and norm.num_features % kernels.LANES == 0:
                self._fuse(node, norm)
        for node in list(self.graph.nodes):
            if isinstance(layer := self._module(node), BinaryConv2d) and _fits(layer):
                self._split(node, layer)
        for node in reversed(self.graph.nodes):
            if not node.users and node.op.startswith("call"):
                if node in self.units:
                    getattr(self.owner, str(self.units[node].target)).activations = False
                self.graph.erase_node(node)
        for node in self.graph.nodes:  # modules that stay as they are
            if node.op == "call_module" and not hasattr(self.owner, node.target):
                node.target = self._own(self.modules[node.target])
        graph_module = fx.GraphModule(self.owner, self.graph)
        return graph_module.forward

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _own(self, module: nn.Module) -> str:
        name = f"{type(module).__name__.lower()}{len(self.owner._modules)}"
        self.owner.add_module(name, module)
        return name

    def _match(self, node: fx.Node) -> _Match:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        sums = source
        if source.target is F.max_pool2d and isinstance(source.args[0], fx.Node) and len(source.users) == 1:
            source = source.args[0]
        layer = self._module(source)
        ours = isinstance(layer, BinaryConv2d) and _fits(layer) and len(source.users) == 1
        match = _Match(source if ours else None, sums, None, False, node)
        if (user := _only_user(match.last)) and user.target in (operator.add, torch.add) and len(user.args) == 2:
            others = [a for a in user.args if a is not node]
            if len(others) == 1 and isinstance(others[0], fx.Node):
                match.skip, match.last = others[0], user
        if (user := _only_user(match.last)) and user.target is F.hardtanh:
            match.clamp, match.last = True, user
        return match

    def _fuse(self, node: fx.Node, norm: nn.BatchNorm2d) -> None:
        match = self._match(node)
        turned = match.layer is not None and match.layer is not match.sums
        layer = self._module(match.layer) if match.layer else None
        assert layer is None or isinstance(layer, BinaryConv2d)
        with self.graph.inserting_after(match.last):
            unit = self.graph.call_module(self._own(Unit(norm, layer, turned, match.clamp)))
        with self.graph.inserting_after(unit):
            activations = self.graph.call_function(operator.getitem, (unit, 0))
        match.last.replace_all_uses_with(activations)
        unit.args = (match.sums, match.skip) if match.skip else (match.sums,)
        self.units[activations] = unit
        if match.layer is not None:
            match.layer.meta["turned"] = turned

    def _split(self, node: fx.Node, layer: BinaryConv2d) -> None:
        """A binary convolution becomes its signs and its sums; alpha is the unit's."""
        if "turned" not in node.meta:  # no unit follows
            return
        source = node.args[0]
        assert isinstance(source, fx.Node)
        with self.graph.inserting_before(node):
            if source in self.units:
                unit = self.units[source]
                getattr(self.owner, str(unit.target)).signs = True
                signs = self.graph.call_function(operator.getitem, (unit, 1))
            else:
                signs = self.graph.call_module(self._own(Signs()), (source,))
            sums = self.graph.call_module(self._own(Sums(layer, node.meta["turned"])), (signs,))
        node.replace_all_uses_with(sums)


def _fits(layer: BinaryConv2d) -> bool:
    """Whether the kernels can take the layer: binary activations, channels in sixteens, plain zero padding."""
    channels = (layer.in_channels, layer.out_channels)
    return layer.binary_activations and not any(c % kernels.LANES for c in channels)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def fused_regularizer(model: nn.Module, tau: float) -> Tensor:
    """loss.periodic_regularizer for a model on the CPU, all its layers at once."""
    layers = [layer for _, layer in binary_layers(model)]
    if not layers or any(layer.weight.numel() % kernels.LANES for layer in layers):
        return periodic_regularizer(model, tau)
    return tau * kernels.mean_squared_sines([layer.weight for layer in layers], [layer.freq for layer in layers])


def fuse(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network's forward pass around the kernels: images (N, 3, H, W) to logits, differentiable in training mode.

    It takes the place of network.forward on the CPU, in float32 or under bfloat16 autocast; in evaluation mode it has
    no gradient. Raises CompilerMissing where the kernels cannot be compiled.
    """
    kernels.library()
    return Rewriter(network).rewritten()
