"""The operations of a network's graph that the compiled instructions know."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from biper.nn.activations import RPReLU
from biper.nn.graph import is_plain_hardtanh
from biper.packed.layers import FoldedNorm, PackedConv2d
from biper.packed.program import IN_TURN, SumOrder

Window = tuple[int, int, int]  # size, stride, padding


@dataclass
class Step:
    """A node that the instructions know. kind: conv, real, norm, add, activation, maximum, average, pad or repeat."""

    kind: str
    module: nn.Module | None = None  # of an activation: a PReLU or RPReLU, None if it is hardtanh
    window: Window = (1, 1, 0)  # of maximum and average
    front: int = 0  # channels of zeros before, of pad
    copies: int = 1  # side by side, of repeat
    order: SumOrder = IN_TURN  # of real


Steps = dict[fx.Node, Step]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's tensor, batch included; () if it is none."""
    shape: tuple[int, ...] = node.meta.get("shape", ())
    return shape


def known(node: fx.Node, module: nn.Module | None) -> Step | None:
    """What the instructions make of a node, which calls that module if any; None if it is torch's to run."""
    if len(shape_of(node)) != 4 or not node.args:
        return None
    if isinstance(module, PackedConv2d):
        return Step("conv", module) if module.binary_activations else None
    if isinstance(module, FoldedNorm):
        return Step("norm", module)
    if isinstance(module, nn.PReLU | RPReLU):
        each = len(module.weight) == shape_of(node)[1]  # a single slope for all channels is torch's to spread
        return Step("activation", module) if each and type(module) in (nn.PReLU, RPReLU) else None
    if node.target in (operator.add, torch.add) and not node.kwargs:
        operands = {a for a in node.args if isinstance(a, fx.Node) and shape_of(a) == shape_of(node)}
        return Step("add") if len(operands) == 2 else None
    if node.target is F.hardtanh:
        return Step("activation") if is_plain_hardtanh(node) else None
    if node.target is torch.cat:
        return _repeat(node)
    if node.target is F.pad:
        return _pad(given(node, ("pad", "mode", "value")))
    if node.target is F.avg_pool2d:
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        return _average(given(node, names))
    if node.target is F.max_pool2d:
        return _maximum(given(node, ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")))
    return None


def given(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """A function's arguments behind the first, by name."""
    return dict(zip(names, node.args[1:], strict=False)) | node.kwargs


def _pad(given: dict[str, Any]) -> Step | None:
    """Channels of zeros before and behind."""
    width = given["pad"]
    if len(width) != 6 or any(width[:4]) or min(width[4:]) < 0:
        return None
    zeros = given.get("mode", "constant") == "constant" and not given.get("value")
    return Step("pad", front=width[4]) if zeros else None


def _repeat(node: fx.Node) -> Step | None:
    """Channels side by side with themselves."""
    parts, dim = node.args[0], given(node, ("dim",)).get("dim", 0)
    alone = isinstance(parts, list | tuple) and len(node.all_input_nodes) == 1 and dim in (1, -3)
    return Step("repeat", copies=len(parts)) if alone else None  # type: ignore[arg-type]


def _average(given: dict[str, Any]) -> Step | None:
    """The mean over square windows side by side."""
    size = given["kernel_size"]
    plain = given.get("stride") in (None, size) and not given.get("padding") and not given.get("divisor_override")
    side, *others = set(size) if isinstance(size, tuple) else (size,)
    return None if others or not plain or not isinstance(side, int) else Step("average", window=(side, side, 0))


def _maximum(given: dict[str, Any]) -> Step | None:
    """The maximum over square windows."""
    size = given["kernel_size"]
    window = size, given.get("stride") or size, given.get("padding", 0)
    plain = given.get("dilation", 1) == 1 and not given.get("ceil_mode") and not given.get("return_indices")
    return Step("maximum", window=window) if plain and all(isinstance(n, int) for n in window) else None
