"""Packed networks: from a network of stage 2 to one whose binary weights are bits, and how it runs."""

import copy
import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from biper.errors import UsageError, one_line
from biper.models.metadata import Metadata
from biper.nn.layers import BinaryConv2d, binary_layers
from biper.packed import runtime as kernels
from biper.packed.compile import Segmented
from biper.packed.layers import FoldedNorm, Norms, PackedConv2d

log = logging.getLogger("biper")
CHUNK = 1 << 23  # bytes that the largest activation of the images taken at a time should have, to stay in the caches
FEW = 16  # images: as many are taken at a time at least


class PackedNetwork(nn.Module):
    """A network with packed layers, for inference: images (N, 3, H, W) to logits (N, classes).

    `network` is the module tree, which torch can run, export and compile as any other. On the CPU its forward pass runs
    as segments of compiled instructions, which round alike, unless it is watched by hooks; large batches go in parts.
    Its layers may be given other values or moved; another layer in the place of one is not seen once it has run.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval().requires_grad_(False)
        metadata = getattr(network, "metadata", None)
        self.metadata: Metadata | None = metadata
        self._hooks = [h for m in self.network.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._forwards: dict[Any, Segmented | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_forwards": {}}  # they are made anew

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) normalized -> (N, classes)."""
        if not self._runs_compiled(images):
            return self._layer_by_layer(images)
        few = min(len(images), 2)  # torch convolves a single image in its own way
        key = (images.shape[1:], few)
        if key not in self._forwards:
            self._forwards[key] = self._segmented(torch.zeros_like(images[:few], memory_format=torch.contiguous_format))
        segmented = self._forwards[key]
        if segmented is None:
            return self._layer_by_layer(images)
        at_once = max(CHUNK // segmented.largest, torch.get_num_threads(), FEW)
        parts = torch.tensor_split(images, -(-len(images) // at_once))  # of two images or more, unless there is but one
        results = [segmented.forward(part) for part in parts]
        return results[0] if len(results) == 1 else torch.cat(results)

    def describe(self) -> str:
        """How it computes, in a few words."""
        way = kernels.chosen()
        return "packed, plain torch" if way == kernels.TORCH else f"packed, popcount by {way}"

    def _layer_by_layer(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def _runs_compiled(self, images: Tensor) -> bool:
        if (
            self.training
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or images.device.type != "cpu"
            or images.dtype != torch.float32
        ):
            return False
        if images.dim() != 4 or not len(images) or (images.requires_grad and torch.is_grad_enabled()):
            return False
        return kernels.chosen() != kernels.TORCH and not any(self._hooks)

    def _segmented(self, example: Tensor) -> Segmented | None:
        try:
            with torch.no_grad():
                return Segmented(self.network, example)
        except UsageError:  # of the network itself, about the images: layer by layer it says it again
            return None
        except Exception as error:  # whatever a network of somebody's own may do
            log.warning("this packed network runs layer by layer, which is slower: %s", one_line(error))
            return None


def pack(model: nn.Module) -> PackedNetwork:
    """A copy of a network of stage 2 for inference, with binary weights as bits and batch norms folded.

    What is neither stays as it is. Raises UsageError (a ValueError) for a network of stage 1, or without binary layers.
    """
    if not any(True for _ in binary_layers(model)):
        raise UsageError("there is nothing to pack: the network has no binary layers")
    return PackedNetwork(replaced(copy.deepcopy(model).cpu().eval(), PackedConv2d.of, FoldedNorm.of))


def unfilled(network: nn.Module) -> PackedNetwork:
    """A network packed in shape alone, without values: on the meta device where the network is."""
    return PackedNetwork(replaced(network, PackedConv2d.like, FoldedNorm.like))


def replaced(
    network: nn.Module, conv: Callable[[BinaryConv2d], nn.Module], norm: Callable[[Norms], nn.Module]
) -> nn.Module:
    """The network itself, with conv(layer) in the place of its binary layers and norm(layer) of its batch norms.

    Those whose forward pass is somebody's own stay as they are.
    """
    made: dict[nn.Module, nn.Module] = {}

    def new(module: nn.Module) -> nn.Module:
        if module not in made:
            made[module] = module
            if isinstance(module, BinaryConv2d) and _plain(module):
                made[module] = conv(module)
            elif type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) and module.running_mean is not None:
                made[module] = norm(cast(Norms, module))
        return made[module]

    for module in list(network.modules()):
        for name, child in module._modules.items():  # a layer that is used twice too
            if child is not None:
                module._modules[name] = new(child)
    return new(network)


def _plain(layer: BinaryConv2d) -> bool:
    """Whether it computes as BinaryConv2d does."""
    kind = type(layer)
    return (kind.forward, kind.effective_weight) == (BinaryConv2d.forward, BinaryConv2d.effective_weight)
