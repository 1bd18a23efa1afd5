"""From a network with binary weights to a packed one."""

import copy
import logging
import warnings
from typing import cast

from torch import nn

from biper.errors import UsageError
from biper.models.checkpoint import require_finite
from biper.models.metadata import Metadata
from biper.models.registry import Network
from biper.nn.convert import find_blocked_signs
from biper.nn.graph import is_watched
from biper.nn.layers import ONE_SIDED, BinaryConv2d, BinaryLayer, BinaryLinear, binary_layers, replace_modules
from biper.nn.norms import Norm
from biper.nn.trials import gives_signs
from biper.packed.layers import FoldedNorm, PackedConv2d, PackedLinear, threshold_of
from biper.packed.network import PackedNetwork

log = logging.getLogger("biper")


def pack(model: nn.Module) -> PackedNetwork:
    """A copy of a network for inference, with binary weights as bits and batch norms folded. Any module tree.

    Binary layers of a class of one's own that computes in another way stay as they are: a warning names them, as it
    names layers all of whose inputs' signs are +1. Raises UsageError (a ValueError) for a network without binary
    layers, one of which nothing could be packed, one whose weights are real, and one that has diverged.
    """
    layers = dict(binary_layers(model))
    if not layers:
        raise UsageError("there is nothing to pack: the network has no binary layers (see biper.convert)")
    plain = {name for name, layer in layers.items() if _is_plain(layer)}
    own = [
        f"{name or 'the network itself'} ({type(layer).__name__})"
        for name, layer in layers.items()
        if name not in plain
    ]
    if len(own) == len(layers):
        raise UsageError(f"there is nothing to pack: all binary layers compute in a way of their own: {_few(own)}")
    if own:
        warnings.warn(f"these layers compute in a way of their own and stay real: {_few(own)}", stacklevel=2)
    real = [name for name, layer in layers.items() if name in plain and not layer.weight_quantizer.binary]
    if real:
        raise UsageError(
            f"the weights of {_few(real)} are real, as in stage 1: train stage 2, or biper.binarize_(model), then pack"
        )
    for name in sorted(
        find_blocked_signs(model) | {n for n, layer in layers.items() if layer.watched.get("one_sided")}
    ):
        warnings.warn(ONE_SIDED.format(name), stacklevel=2)
    if other := {str(layer.weight.dtype) for layer in layers.values()} - {"torch.float32"}:
        raise UsageError(f"networks are packed in float32, this one is {', '.join(other)}: use model.float()")
    if hooked := [name for name, module in model.named_modules() if _could_fold(module) and is_watched(module)]:
        warnings.warn(f"these norms have hooks and are not folded: {_few(hooked)}", stacklevel=2)
    require_finite(model, "the model")
    converted = "conversion" in vars(model)  # it is no longer what its metadata say
    metadata = model.metadata if isinstance(model, Network) and not converted else None
    return PackedNetwork(replace_modules(copy.deepcopy(model).cpu().eval(), _packed), metadata)


def pack_shape(network: nn.Module, metadata: Metadata | None = None) -> PackedNetwork:
    """A network itself, packed in shape alone, without values: on the meta device where the network is."""
    return PackedNetwork(replace_modules(network, _packed_shape), metadata)


def _packed(module: nn.Module) -> nn.Module | None:
    if isinstance(module, BinaryConv2d) and _is_plain(module):
        return PackedConv2d.of(module)
    if isinstance(module, BinaryLinear) and _is_plain(module):
        return PackedLinear.of(module)
    return FoldedNorm.of(cast(Norm, module)) if _folds(module) else None


def _packed_shape(module: nn.Module) -> nn.Module | None:
    if isinstance(module, BinaryConv2d) and _is_plain(module):
        return PackedConv2d.like(module)
    if isinstance(module, BinaryLinear) and _is_plain(module):
        return PackedLinear.like(module)
    return FoldedNorm.like(cast(Norm, module)) if _folds(module) else None


def _folds(module: nn.Module) -> bool:
    return _could_fold(module) and not is_watched(module)


def _could_fold(module: nn.Module) -> bool:
    return type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) and module.running_mean is not None


def _is_plain(layer: BinaryLayer) -> bool:
    """Whether it computes as its base does, and no hook changes that."""
    base = BinaryConv2d if isinstance(layer, BinaryConv2d) else BinaryLinear
    names = ("forward", "effective_weight", "output_scale", "quantized_input")
    return (
        not is_watched(layer)
        and _takes_signs(layer)
        and all(getattr(type(layer), name) is getattr(base, name) for name in names)
    )


def _takes_signs(layer: BinaryLayer) -> bool:
    """Whether its input quantizer, if any, gives +1 from its threshold on in evaluation, else -1: as packed layers."""
    quantizer, threshold = layer.input_quantizer, threshold_of(layer)
    if quantizer is None:
        return True
    channels = (layer.in_channels, 1, 1) if isinstance(layer, BinaryConv2d) else (layer.in_features,)
    if threshold is not None and threshold.numel() > 1 and threshold.shape != channels:
        return False  # another one in every place
    if any(tensor.is_meta for tensor in (*quantizer.parameters(), *quantizer.buffers())):
        return True  # of a network in shape alone
    return gives_signs(quantizer, channels)


def _few(names: list[str]) -> str:
    """The first names of many, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
