"""A plan as C: constants, and a function of straight calls."""

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biper.errors import UsageError
from biper.nn.activations import RPReLU
from biper.packed.c.plan import KernelCall, Map, Plan
from biper.packed.layers import PackedConv2d, PackedLinear

LANES = 16  # BIPER_LANES of kernels.h
WORD = 32
FITS = 2**15 - 2  # sums that an int16_t can be compared with
TYPES = {"float32": "BIPER_FLOAT32", "int16": "BIPER_INT16", "int8": "BIPER_INT8"}
LIMITS = {"int16": 32767, "int8": 127}
Steps = dict[Map, float]  # what one unit of a map's integers stands for


@dataclass
class Source:
    """The text of network.c under construction."""

    plan: Plan
    steps: Steps
    constants: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)

    def text(self) -> tuple[str, str]:
        """The constants, and the body of the function that calls the kernels."""
        for number, call in enumerate(self.plan.calls):
            self._add(number, call)
        return "\n".join(self.constants), "\n".join(self.body)

    def _add(self, number: int, call: KernelCall) -> None:
        names = [str(node.target) for node in call.nodes if node.op == "call_module"]
        self.constants.append(f"\n/* {', '.join(names) or call.kind} */")
        layer = self._layer(number, call)  # writes the arrays that it names
        self.constants.append(f"static const biper_layer layer_{number} = {layer};")
        arguments = [f"&layer_{number}"]
        if call.layer is not None:
            arguments.append(self._weights(number, call))
        if call.kind == "average":
            arguments += [str(call.front), str(call.copies)]
        arguments.append(self._at(call.reads))
        if call.kind not in ("average", "flatten", "maximum"):
            arguments.append(self._at(call.adds))
        arguments.append(self._at(call.out))
        if call.kind not in ("average", "flatten"):
            arguments.append("NULL" if call.bits is None else self._at(call.bits))
        self.body.append(f"    biper_{call.kind}({', '.join(arguments)});")

    def _at(self, value: Map | None) -> str:
        """A map, or words of bits, as an argument."""
        if value is None:
            return "biper_nothing()"
        if value.bits:
            return f"biper_bits(arena, {self.plan.offsets[value]})"
        if value is self.plan.image:
            return "biper_numbers(image)"
        if value is self.plan.logits:
            return "biper_numbers(logits)"
        step = literal(self.steps[value]) if value.kind != "float32" else "1.0f"
        return f"biper_map_at(arena, {self.plan.offsets[value]}, {step}, {TYPES[value.kind]})"

    def _layer(self, number: int, call: KernelCall) -> str:
        """The initializer of a biper_layer."""
        shape, geometry = _shapes(call), _geometry(call)
        sizes = [shape[0][1], shape[0][2], shape[0][0], shape[1][1], shape[1][2], shape[1][0]]
        return f"{{{', '.join(map(str, (*sizes, *geometry)))}, {self._tail(number, call)}}}"

    def _tail(self, number: int, call: KernelCall) -> str:
        """The initializer of a biper_tail."""
        channels = _shapes(call)[1][0]
        if (found := integer_thresholds(call)) is not None:
            least, turned = found
            integers = self._array(f"integers_{number}", "int16_t", [str(n) for n in least.tolist()])
            words = self._array(f"turned_{number}", "uint32_t", _words(turned[None, :]))
            return f"{{{', '.join(['NULL'] * 8)}, {integers}, {words}, BIPER_NONE}}"
        given = _numbers(call, channels)
        names = ("alpha", "bias", "gain", "shift", "before", "slope", "after", "threshold")
        arrays = [self._floats(f"{name}_{number}", given.get(name)) for name in names]
        return f"{{{', '.join(arrays)}, NULL, NULL, {_activation(call)}}}"

    def _weights(self, number: int, call: KernelCall) -> str:
        assert call.layer is not None
        w = weights_of(call)  # (groups, C_out/groups, taps, channels)
        if call.kind == "real":
            return self._array(f"weights_{number}", "float", [literal(x) for x in _blocks(w).tolist()])
        bits = w > 0
        if call.kind == "binary":
            padded = F.pad(bits, (0, -bits.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
            values = (padded.long() << torch.arange(WORD)).sum(-1)
            return self._array(f"weights_{number}", "uint32_t", [f"0x{x:08x}u" for x in _blocks(values).tolist()])
        blocks = F.pad(bits, (0, 0, 0, 0, 0, -bits.shape[1] % LANES)).unflatten(1, (-1, LANES))
        packed = (blocks.movedim(2, -1).long() << torch.arange(LANES)).sum(-1).flatten()
        return self._array(f"weights_{number}", "uint16_t", [f"0x{x:04x}u" for x in packed.tolist()])

    def _floats(self, name: str, values: Tensor | None) -> str:
        return "NULL" if values is None else self._array(name, "float", [literal(x) for x in values.tolist()])

    def _array(self, name: str, kind: str, values: list[str]) -> str:
        lines = ",\n    ".join(", ".join(values[i : i + 8]) for i in range(0, len(values), 8))
        self.constants.append(f"static const {kind} {name}[{len(values)}] = {{\n    {lines}}};")
        return name


def weights_of(call: KernelCall) -> Tensor:
    """A layer's weights (groups, C_out/groups, taps, channels of a group)."""
    layer = call.layer
    assert layer is not None
    if isinstance(layer, PackedConv2d | PackedLinear):
        w = layer.binary_weight()
        if call.pool:
            w = w * _turned(layer)[:, None, None, None]
    else:
        w = cast(Tensor, layer.weight).detach()
    w = w if w.dim() == 4 else w[:, :, None, None]
    groups = getattr(layer, "groups", 1)
    arranged: Tensor = w.permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, (groups, -1))
    return arranged


def _turned(layer: PackedConv2d | PackedLinear) -> Tensor:
    """-1 for each channel whose alpha is negative: the maximum of its sums is taken before alpha scales them."""
    return torch.where(layer.alpha.flatten() < 0, -1.0, 1.0)


def _blocks(w: Tensor) -> Tensor:
    """Numbers (groups, C_out/groups, taps, n) in the order of the kernels: sixteen output channels side by side."""
    per_group = w.shape[1]
    parts = [w[:, i : i + LANES].permute(0, 2, 3, 1).flatten(1) for i in range(0, per_group, LANES)]
    return torch.cat(parts, 1).flatten()


def _words(bits: Tensor) -> list[str]:
    padded = F.pad(bits, (0, -bits.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    return [f"0x{x:08x}u" for x in (padded.long() << torch.arange(WORD)).sum(-1).flatten().tolist()]


def literal(x: float) -> str:
    """A float32 as C reads it back."""
    text = f"{np.float32(x):.9g}"
    if text in ("inf", "-inf", "nan"):
        raise UsageError("a number of the network is not finite: it cannot be written as C")
    return text + ("f" if any(c in text for c in ".e") else ".0f")


def _shapes(call: KernelCall) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Channels, height and width of what a call reads and gives."""
    given = call.out or call.bits
    assert call.reads is not None
    assert given is not None
    return call.reads.shape, given.shape


def _geometry(call: KernelCall) -> tuple[int, ...]:
    """From kernel_h to pool."""
    layer = call.layer
    if isinstance(layer, PackedConv2d | nn.Conv2d):
        pairs = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        return *(int(n) for pair in pairs for n in pair), layer.groups, int(call.pool)
    height, width, stride, pad = call.window
    return height, width, stride, stride, pad, pad, 1, 1, 1, 0


def _numbers(call: KernelCall, channels: int) -> dict[str, Tensor | None]:
    """What the tail takes, (channels,) each."""
    given: dict[str, Any] = {"threshold": call.threshold}
    if isinstance(call.layer, PackedConv2d | PackedLinear):
        given["alpha"] = call.layer.alpha.abs() if call.pool else call.layer.alpha
    if call.layer is not None:
        given["bias"] = call.layer.bias
    if call.norm is not None:
        given |= {"gain": call.norm.gain, "shift": call.norm.shift}
    module = call.activation.module if call.activation else None
    if isinstance(module, nn.PReLU | RPReLU):
        given["slope"] = module.weight
    if isinstance(module, RPReLU):
        given |= {"before": module.before, "after": module.after}
    return {name: None if x is None else x.detach().flatten().expand(channels) for name, x in given.items()}


def _activation(call: KernelCall) -> str:
    if call.activation is None:
        return "BIPER_NONE"
    module = call.activation.module
    if module is None:
        return "BIPER_HARDTANH"
    return "BIPER_RELU" if isinstance(module, nn.ReLU) else "BIPER_PRELU"


@torch.no_grad()
def integer_thresholds(call: KernelCall) -> tuple[Tensor, Tensor] | None:
    """Where a call gives nothing but signs of sums of signs: int16 (C,), and which channels are turned, bool (C,).

    A sign is +1 from the integer on, or, turned, below it: found by computing, with the network's own layers, what
    becomes of every sum there can be. None where floats are needed, or a sign is no threshold of the sum.
    """
    layer = call.layer
    alone = call.kind == "binary" and call.out is None and call.skip is None
    if not alone or layer is None or getattr(layer, "groups", 1) > 1:
        return None
    terms = weights_of(call)[0, 0].numel()
    if terms > FITS:
        return None
    numbers = _numbers(call, _shapes(call)[1][0])
    sums = torch.arange(-terms, terms + 1, dtype=torch.float32)
    alpha = numbers["alpha"]
    assert alpha is not None
    x = (sums * alpha[:, None])[None, :, :, None]  # (1, C, sums, 1)
    if numbers.get("bias") is not None:
        x = x + numbers["bias"][:, None, None]  # type: ignore[index]
    x = x if call.norm is None else call.norm(x)
    if call.activation is not None:
        x = F.hardtanh(x) if call.activation.module is None else call.activation.module(x)
    threshold = numbers["threshold"]
    signs = x[0, :, :, 0] >= (torch.zeros(1) if threshold is None else threshold)[:, None]  # (C, sums)
    changes = (signs[:, 1:] != signs[:, :-1]).sum(1)
    if bool((changes > 1).any()):
        return None
    turned = signs[:, 0] & (changes == 1)
    below = torch.where(turned[:, None], signs, ~signs).sum(1)  # how many of the sums come before the change
    return (below - terms).to(torch.int16), turned
