"""What a network costs, layer by layer: parameters, bytes as floats and packed, and operations for an image."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from biper.nn.layers import BinaryConv2d, BinaryLayer, BinaryLinear
from biper.nn.quantizers import Quantizer
from biper.packed.bits import bits_shape


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


@torch.no_grad()
def costs(model: nn.Module, image_size: int) -> list[LayerCost]:
    """The layers with parameters in the order in which an image (3, image_size, image_size) meets them.

    Raises UsageError if the network does not take images of that size.
    """
    found: list[LayerCost] = []
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(_cost(names[module], module, output))

    watched = [m for m in model.modules() if list(m.parameters(recurse=False)) and not isinstance(m, Quantizer)]
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
    if isinstance(module, BinaryConv2d | BinaryLinear):
        return _binary_cost(name, shape, module, places if isinstance(module, BinaryConv2d) else 1)
    if isinstance(module, nn.Conv2d | nn.Linear):
        macs = module.weight.numel() * (places if isinstance(module, nn.Conv2d) else 1)
        kind = "conv" if isinstance(module, nn.Conv2d) else "linear"
        return LayerCost(name, kind, shape, 0, parameters, size, size, macs)
    kind = type(module).__name__
    packed = 8 * module.num_features if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) else size
    return LayerCost(name, kind, shape, 0, parameters, size, packed)


def _binary_cost(name: str, shape: str, module: BinaryLayer, places: int) -> LayerCost:
    threshold = None if module.input_quantizer is None else module.input_quantizer.threshold
    kept = sum(p.numel() for p in (module.alpha, module.bias, threshold) if p is not None)
    weights, real = module.weight.numel(), sum(p.numel() for p in module.parameters()) - module.weight.numel()
    out_channels, inputs = module.weight.shape[:2]
    groups = module.groups if isinstance(module, BinaryConv2d) else 1
    height, width = module.weight.shape[2:] if isinstance(module, BinaryConv2d) else (1, 1)
    words = torch.Size(bits_shape(out_channels, inputs, (height, width), groups)).numel()
    layer = "conv" if isinstance(module, BinaryConv2d) else "linear"
    binary, macs = 0, weights * places
    if module.input_quantizer is not None:
        macs, binary = 0, macs
    kind = f"binary {layer}" if binary else f"binary-weight {layer}"
    return LayerCost(name, kind, shape, weights, real, 4 * (weights + real), 8 * words + 4 * kept, macs, binary)


def total(layers: Sequence[LayerCost]) -> LayerCost:
    """The sums over the layers."""
    sums = [sum(column) for column in list(zip(*map(astuple, layers), strict=True))[3:]]
    return LayerCost("total", "", "", *sums)
