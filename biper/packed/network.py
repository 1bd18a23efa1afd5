"""A packed network, whose binary weights are bits, and how it runs."""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, fx, nn

from biper.errors import UsageError, one_line
from biper.models.metadata import Metadata
from biper.packed import runtime
from biper.packed.compile import FEW, Segmented, traced
from biper.packed.layers import FoldedNorm, PackedConv2d

log = logging.getLogger("biper")
CHUNK = 1 << 23  # bytes that the largest activation of the images taken at a time should have, to stay in the caches
KEPT = 8  # shapes of images whose segments are kept: up to a megabyte each


class PackedNetwork(nn.Module):
    """A network with packed layers, for inference: images (N, 3, H, W) to logits (N, classes).

    `network` is the module tree, which torch can run, export and compile as any other. On the CPU its forward pass runs
    as segments of compiled instructions, which round alike, unless it is watched by hooks; large batches go in parts.
    `metadata` says what it is, where it comes from `create_model` or a checkpoint; else it is None.
    Its layers may be given other values or moved; another layer in the place of one is not seen once it has run, nor
    are values that are written past torch, through NumPy or `.data`, into weights or into what decides the next layer's
    bits: alpha, bias, gain, shift and threshold. What the instructions compute has no gradient.
    """

    def __init__(self, network: nn.Module, metadata: Metadata | None = None) -> None:
        super().__init__()
        self.network = network
        self.eval().requires_grad_(False)
        _count_versions(self.network)
        self.metadata = metadata
        self._hooks = [h for m in self.network.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._forwards: dict[Any, Segmented | str] = {}  # by shape; or why it runs layer by layer
        self._said: set[str] = set()
        self._graph = self._traced()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_forwards": {}, "_said": set(), "_graph": None}  # they are made anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"_said": set()} | state)  # earlier versions had none
        _count_versions(self.network)
        self._graph = self._traced()

    def _traced(self) -> fx.Graph | str:
        """The network's graph, or why there is none.

        It is traced here, and not when the network runs: meanwhile no thread of the process can call a module.
        """
        try:
            return traced(self.network)
        except Exception as error:  # whatever a network of somebody's own may do
            return one_line(error)

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) normalized -> (N, classes). Raises UsageError for other inputs where it is known."""
        if not self._runs_compiled(images):
            self._require_images(images)
            return self._layer_by_layer(images)
        segmented = self._segmented_for(images)
        if isinstance(segmented, str):
            logits = self._layer_by_layer(images)
            self._say(segmented)
            return logits
        at_once = max(CHUNK // segmented.largest, torch.get_num_threads(), FEW)
        parts = torch.tensor_split(images, -(-len(images) // at_once))  # of two images or more, unless there is but one
        results = [segmented.forward(part) for part in parts]
        return results[0] if len(results) == 1 else torch.cat(results)

    def describe(self) -> str:
        """How it computes, in a few words; whether layer by layer is known when it has run."""
        device = next((tensor.device for tensor in self.buffers()), torch.device("cpu"))
        way = runtime.chosen() if device.type == "cpu" else runtime.TORCH
        compiled = all(isinstance(way, Segmented) for way in self._forwards.values()) and not any(self._hooks)
        whole = "" if compiled else ", layer by layer"
        return "packed, plain torch" if way == runtime.TORCH else f"packed, popcount by {way}{whole}"

    def _require_images(self, images: object) -> None:
        """Raise UsageError for what a network of `create_model` does not take."""
        if self.metadata is None or torch.compiler.is_compiling():
            return
        if not isinstance(images, Tensor):
            raise UsageError(f"{self.metadata.model} takes a tensor of images, not a {type(images).__name__}")
        own = next(self.network.parameters()).dtype
        wrong = images.dtype != own and not (
            images.is_floating_point() and torch.is_autocast_enabled(images.device.type)
        )
        if wrong or images.dim() != 4 or images.shape[1] != 3:
            given = f"{images.dtype} {tuple(images.shape)}"
            raise UsageError(f"{self.metadata.model} takes images (N, 3, H, W), normalized, {own}: not {given}")

    def _layer_by_layer(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def _runs_compiled(self, images: Tensor) -> bool:
        if (
            not isinstance(images, Tensor)
            or self.training
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or images.device.type != "cpu"
            or images.dtype != torch.float32
        ):
            return False
        if images.dim() != 4 or not len(images) or (images.requires_grad and torch.is_grad_enabled()):
            return False
        if torch._C._len_torch_dispatch_stack() or type(images).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return False  # somebody wants to see, or to replace, what torch computes
        return runtime.chosen() != runtime.TORCH and not any(self._hooks)

    def _say(self, why: str) -> None:
        """Warn, once, that it runs layer by layer, and why; '' is said by the network's own error."""
        if why and why not in self._said:
            self._said.add(why)
            log.warning("this packed network runs layer by layer, which is slower: %s", why)

    def _segmented_for(self, images: Tensor) -> Segmented | str:
        """What runs images of this shape; of the shapes that came last it is kept."""
        few = min(len(images), 2)  # torch convolves a single image in its own way, and by one thread in another
        key = (images.shape[1:], few, torch.get_num_threads() > 1, torch.is_autocast_enabled("cpu"))
        kept = self._forwards
        if key in kept and key == next(reversed(kept)):
            return kept[key]
        kept = dict(kept)  # never changed in place: other threads may be reading it, and at worst make theirs anew
        if key in kept:
            segmented = kept.pop(key)
        else:
            self._require_images(images)  # once a shape: small networks wait for it
            segmented = self._segmented(torch.zeros_like(images[:few], memory_format=torch.contiguous_format))
        recent = list(kept.items())[-KEPT + 1 :]
        self._forwards = {**dict(recent), key: segmented}
        return segmented

    def _segmented(self, example: Tensor) -> Segmented | str:
        """What runs such images, or why they are run layer by layer; '' if that has been said."""
        try:
            if isinstance(self._graph, str):
                raise ValueError(self._graph)
            with torch.no_grad():
                return Segmented(self.network, copy.deepcopy(self._graph), example)
        except UsageError:  # of the network itself, about the images: layer by layer it says it again
            return ""
        except Exception as error:  # whatever a network of somebody's own may do
            return one_line(error)


def _count_versions(network: nn.Module) -> None:
    """Let torch count when values are written into what other numbers are made of.

    It does not for tensors that inference mode made.
    """
    clones: dict[Tensor, nn.Parameter] = {}  # tied weights stay tied
    with torch.inference_mode(False):
        for module in network.modules():
            if isinstance(module, PackedConv2d | FoldedNorm):
                for name, tensor in module.named_buffers(recurse=False):
                    if tensor.is_inference():
                        setattr(module, name, tensor.clone())
            elif isinstance(module, nn.Conv2d) and module.weight.is_inference():
                weight = module.weight
                module.weight = clones.setdefault(weight, nn.Parameter(weight.clone(), requires_grad=False))
