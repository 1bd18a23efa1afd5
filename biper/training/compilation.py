"""A network through torch.compile, where it keeps the gradients."""

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from biper.errors import one_line
from biper.nn.layers import BinaryLayer, binary_layers

log = logging.getLogger("biper")


class CompiledNetwork:
    """A network through torch.compile, for batches of one size; the last one of an epoch goes through it as it is.

    What was compiled in this process before is forgotten: there is a limit for each class, however many networks.
    """

    def __init__(self, network: nn.Module) -> None:
        torch.compiler.reset()
        self.network, self.compiled = network, torch.compile(network, dynamic=False)
        self.works = True
        self.shapes: dict[bool, torch.Size] = {}  # of the batches it is compiled for, in training and evaluation

    def __call__(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) -> (N, classes)."""
        mode = self.network.training
        if mode not in self.shapes:
            self.shapes[mode] = images.shape
            self._warm_up(images)
        logits: Tensor = (self.compiled if images.shape == self.shapes[mode] else self.network)(images)
        return logits

    def _warm_up(self, images: Tensor) -> None:
        if not self.works:  # in the other mode
            return
        what = "training" if self.network.training else "evaluation"
        log.info("torch.compile: compiling the %s step, once; this takes about a minute", what)
        start = time.monotonic()
        state = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        try:
            if torch.is_grad_enabled():
                require_surrogates(self.network)
            self._compile(images)
        except Exception as error:
            log.warning(
                "torch.compile does not work here: going on without it, as with --no-compile (%s)", one_line(error)
            )
            self.works, self.compiled = False, self.network
        else:
            log.info("torch.compile: done in %.0f s", time.monotonic() - start)
        with torch.no_grad():
            for name, buffer in self.network.named_buffers():
                buffer.copy_(state[name])

    def _compile(self, images: Tensor) -> None:
        """Both passes. Raises RuntimeError if a parameter loses its gradient."""
        named = dict(self.network.named_parameters())
        found = []
        for forward in (self.compiled, self.network):
            logits = forward(images)
            if not logits.requires_grad:  # the backward pass is compiled when it is first run
                return
            found.append(torch.autograd.grad(logits.square().sum(), list(named.values()), allow_unused=True))
        _require_kept(found[0], found[1], list(named))


def require_surrogates(network: nn.Module) -> None:
    """Raise RuntimeError if a quantizer of a network loses its surrogate's gradient once it is compiled.

    Where a network has skips, its parameters have gradients all the same, so the quantizers are compiled by themselves,
    one of each kind. [seen with torch 2.11, for autograd functions that change in place what they return]
    """
    kinds = {(type(x.weight_quantizer), type(x.input_quantizer)): x for _, x in binary_layers(network)}
    for layer in kinds.values():
        inputs = _examples(layer)
        plain, compiled = (
            torch.autograd.grad([y.square().sum() + y.sum() for y in f(*inputs)], inputs, allow_unused=True)
            for f in (_quantizers(layer), torch.compile(_quantizers(layer), backend="aot_eager", dynamic=False))
        )
        _require_kept(compiled, plain, [type(layer.weight_quantizer).__name__, type(layer.input_quantizer).__name__])


def _examples(layer: BinaryLayer) -> tuple[Tensor, ...]:
    """A layer's weights, and two activations a channel or more, within the window of the surrogates."""
    shape = (2, layer.weight.shape[1] * getattr(layer, "groups", 1), *(2 for _ in layer.weight.shape[2:]))
    count = torch.Size(shape).numel()
    activations = torch.linspace(-0.9, 0.8, count, dtype=layer.weight.dtype, device=layer.weight.device).view(shape)
    return (layer.weight.detach().clone().requires_grad_(), activations.requires_grad_())


def _quantizers(layer: BinaryLayer) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """From weights and activations to what the layer makes of them."""

    def both(w: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return layer.weight_quantizer(w), a if layer.input_quantizer is None else layer.input_quantizer(a)

    return both


def _require_kept(compiled: Sequence[Tensor | None], plain: Sequence[Tensor | None], names: Sequence[str]) -> None:
    """Raise RuntimeError, with its name, for a gradient that is there without the compiler, and zero with it."""
    for name, ours, theirs in zip(names, compiled, plain, strict=True):
        if theirs is not None and bool(theirs.any()) and (ours is None or not bool(ours.any())):
            raise RuntimeError(f"it loses the gradient of {name}")
