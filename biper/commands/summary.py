"""What a network consists of and costs, layer by layer: parameters, bytes and operations."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biper.errors import UsageError
from biper.models import create_model, list_models
from biper.models.metadata import Metadata
from biper.models.registry import FAMILIES, network_like
from biper.nn.layers import BinaryConv2d
from biper.packed.bits import bits_shape
from biper.training.inheritance import load_network
from biper.training.process import name_out_of_memory

COUNTED = """params: trainable ones; float32 and packed: bytes of these and of the batch norms' statistics (packed:
a bit a binary weight in whole words of 64, alpha, and a gain and a shift for each channel of a batch norm).
FLOPs and BOPs: multiply-adds for one image, of real and of binary layers; OPs = FLOPs + BOPs/64. Counted are
convolutions and the classifier; not counted are alpha, batch norm, skips, activations and pooling."""


@dataclass(frozen=True)
class LayerCost:
    """One layer. binary, real: its parameters; float32, packed: bytes; flops, bops: multiply-adds for one image."""

    name: str
    kind: str
    output: str
    binary: int = 0
    real: int = 0
    float32: int = 0
    packed: int = 0
    flops: int = 0
    bops: int = 0

    @property
    def ops(self) -> float:
        """FLOPs + BOPs/64: a processor's word takes 64 binary ones at a time."""
        return self.flops + self.bops / 64


@name_out_of_memory()
def described(network: str, given: dict[str, Any]) -> str:
    """The table of a model by name, or of a checkpoint or packed file.

    given: family, num_classes, image_size, freq and model, where the user gave them. Raises UsageError.
    """
    m = _identity(network, given)
    model = network_like(m)
    size = given.get("image_size", m.shown_size)
    if size < 8:
        raise UsageError(f"--image_size {size} is too small: at least 8")
    title = f"{m.model} ({m.family}), {m.num_classes} classes, images of {size}x{size}"
    return f"{title}\n\n{format_table(costs(model, size))}"


def _identity(network: str, given: dict[str, Any]) -> Metadata:
    if Path(network).exists():
        for name in ("family", "num_classes"):
            if name in given:
                raise UsageError(f"--{name} is for a model's name: {network} is a file, which says it")
        metadata = load_network(Path(network), given).metadata
        assert metadata is not None
        return metadata
    families = [given["family"]] if "family" in given else list(FAMILIES)
    family = next((f for f in families if network in list_models(f)), None)
    if family is None:
        choices = ", ".join(sorted({name for f in families for name in list_models(f)}))
        raise UsageError(f"no file and no model {network!r}; models are {choices}")
    classes = given.get("num_classes", FAMILIES[family])
    if classes < 1:
        raise UsageError(f"--num_classes {classes} is too small: at least 1")
    return create_model(network, family=family, num_classes=classes).metadata


@torch.no_grad()
def costs(model: nn.Module, image_size: int) -> list[LayerCost]:
    """The layers with parameters in the order in which an image (3, image_size, image_size) meets them.

    Raises UsageError if the network does not take images of that size.
    """
    found: list[LayerCost] = []
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(_cost(names[module], module, output))

    watched = [m for m in model.modules() if list(m.parameters(recurse=False))]
    hooks = [module.register_forward_hook(note) for module in watched]
    try:
        model.eval()(torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _cost(name: str, module: nn.Module, output: Tensor) -> LayerCost:
    parameters = sum(p.numel() for p in module.parameters(recurse=False))
    floats = sum(b.numel() for b in module.buffers(recurse=False) if b.is_floating_point())
    shape, size = "x".join(map(str, output.shape[1:])), 4 * (parameters + floats)
    places = output[0, 0].numel()  # of one channel
    if isinstance(module, BinaryConv2d):
        weights, inputs = module.weight.numel(), module.in_channels // module.groups
        height, width = module.weight.shape[2:]
        words = torch.Size(bits_shape(module.out_channels, inputs, (height, width), module.groups)).numel()
        packed, macs = 8 * words + 4 * module.alpha.numel(), weights * places
        flops, bops = (0, macs) if module.input_quantizer is not None else (macs, 0)
        kind = "binary conv" if module.input_quantizer is not None else "binary-weight conv"
        return LayerCost(name, kind, shape, weights, parameters - weights, size, packed, flops, bops)
    if isinstance(module, nn.Conv2d | nn.Linear):
        macs = module.weight.numel() * (places if isinstance(module, nn.Conv2d) else 1)
        kind = "conv" if isinstance(module, nn.Conv2d) else "linear"
        return LayerCost(name, kind, shape, 0, parameters, size, size, macs)
    kind = type(module).__name__
    packed = 8 * module.num_features if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) else size
    return LayerCost(name, kind, shape, 0, parameters, size, packed)


def total(layers: Sequence[LayerCost]) -> LayerCost:
    """The sums over the layers."""
    sums = [sum(column) for column in list(zip(*map(astuple, layers), strict=True))[3:]]
    return LayerCost("total", "", "", *sums)


def format_table(layers: Sequence[LayerCost]) -> str:
    """The table that people read: a line a layer, the sums, and what is counted."""
    titles = ("layer", "kind", "output", "binary", "real", "float32 B", "packed B", "FLOPs", "BOPs", "OPs")
    whole = total(layers)
    rows = [titles, *(_row(layer) for layer in [*layers, whole])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    sizes = f"{_size(whole.float32)} in float32, {_size(whole.packed)} packed"
    return "\n".join(
        [
            *(line.rstrip() for line in lines),
            "",
            f"parameters: {whole.binary + whole.real:,}, of which {whole.binary:,} are binary",
            f"size: {sizes}: {whole.float32 / whole.packed:.1f} times smaller",
            f"operations for an image: {whole.flops:,} FLOPs + {whole.bops:,} BOPs / 64 = {whole.ops:,.0f} OPs",
            COUNTED,
        ]
    )


def _row(layer: LayerCost) -> tuple[str, ...]:
    numbers = (layer.binary, layer.real, layer.float32, layer.packed, layer.flops, layer.bops, round(layer.ops))
    return (layer.name, layer.kind, layer.output, *(f"{number:,}" for number in numbers))


def _size(count: int) -> str:
    return f"{count / 1e6:.3f} MB ({8 * count / 1e6:.1f} Mbit)"
