"""A quantizer is tried on a few numbers, so that one of somebody's own fails in one line before it costs a training."""

import copy
import pickle

import torch
from torch import Tensor, nn

from biper.errors import UsageError
from biper.nn.quantizers import InputQuantizer, Quantizer, WeightQuantizer

SHAPE = (4, 3, 3, 3)  # of the weights; the activations are (2, 4, 3, 3)


def try_weight_quantizer(quantizer: WeightQuantizer) -> None:
    """Raise UsageError unless weights become finite ones of their shape, -1 and +1 if it is binary, with a gradient.

    What else somebody's own class raises is let through.
    """
    kind, quantizer = type(quantizer).__name__, copy.deepcopy(quantizer)
    quantizer.fit((SHAPE[0], 1, 1, 1))
    quantizer.set_progress(0.5)
    w = torch.linspace(-0.1, 0.1, 108).view(SHAPE).requires_grad_()
    quantizer.start(w.detach())
    found, scale = quantizer(w), quantizer.scale(w)
    _require_like(f"{kind}.forward(w)", found, w)
    if scale is not None and scale.shape != (SHAPE[0], 1, 1, 1):
        raise UsageError(f"{kind}.scale(w) is {tuple(scale.shape)}: it has to be (C_out, 1, 1, 1), here (4, 1, 1, 1)")
    if scale is not None and not bool((scale >= 0).all()):
        raise UsageError(f"{kind}.scale(w) has negative values: a sign belongs to the weights")
    if quantizer.binary:
        quantizer.signs(w)
    _require_gradient(kind, found, w)


def try_input_quantizer(quantizer: InputQuantizer) -> None:
    """Raise UsageError unless activations become -1 and +1, with a gradient, and in evaluation by `threshold` alone.

    What else somebody's own class raises is let through.
    """
    kind, quantizer = type(quantizer).__name__, copy.deepcopy(quantizer).train()
    quantizer.fit((SHAPE[0], 1, 1))
    quantizer.set_progress(0.5)
    a = torch.linspace(-1.5, 1.5, 72).view(2, SHAPE[0], 3, 3).requires_grad_()
    found = quantizer(a)
    _require_like(f"{kind}.forward(a)", found, a)
    if not bool((found.abs() == 1).all()):
        raise UsageError(f"{kind}.forward(a) gives other values than -1 and +1")
    _require_gradient(kind, found, a)
    threshold = quantizer.threshold
    if threshold is not None and threshold.shape != (SHAPE[0], 1, 1) and threshold.numel() > 1:
        raise UsageError(f"{kind}.threshold is {tuple(threshold.shape)}: make it of the shape that fit() is told")
    if threshold is not None:
        threshold.data.fill_(0.25)  # that it counts is seen where it is not 0
    if not gives_signs(quantizer, (SHAPE[0], 1, 1)):
        bound = "0" if threshold is None else "its threshold"
        raise UsageError(f"{kind} gives, in evaluation, something else than +1 from {bound} on and -1 below")


@torch.no_grad()
def gives_signs(quantizer: InputQuantizer, channels: tuple[int, ...]) -> bool:
    """Whether it gives, in evaluation, +1 from its threshold on, else -1, as packed layers do. On the CPU.

    channels: the shape that `fit` was told, (C_in, 1, 1) or (C_in,).
    """
    with torch.device("cpu"):
        quantizer = copy.deepcopy(quantizer).cpu().float().eval()
        shape = (19, *channels) if len(channels) == 1 else (2, channels[0], 3, 3)
        threshold = torch.zeros(()) if quantizer.threshold is None else quantizer.threshold
        bound = torch.zeros(shape) + threshold
        a = bound + torch.linspace(-3, 3, bound.numel()).reshape(shape).flip(1)
        a.view(-1)[::7] = bound.view(-1)[::7]  # whose sign is +1
        return bool(torch.equal(quantizer(a), torch.where(a >= bound, 1.0, -1.0)))


def _require_like(what: str, found: object, x: Tensor) -> None:
    """Raise UsageError unless it is a finite tensor of x's shape and type."""
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (x.shape, x.dtype):
        got = f"{tuple(found.shape)}, {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise UsageError(
            f"{what} gives {got}: it has to be of its argument's shape and type, {tuple(x.shape)}, {x.dtype}"
        )
    if not bool(found.isfinite().all()):
        raise UsageError(f"{what} gives numbers that are not finite")


def _require_gradient(kind: str, found: Tensor, x: Tensor) -> None:
    """Raise UsageError if nothing flows back to x; the cotangent is uneven, as that of 1s may cancel."""
    gradient = None
    if found.requires_grad:
        uneven = (found * torch.arange(x.numel()).cos().view_as(x)).sum()  # a sum, as torch knows at once what to do
        (gradient,) = torch.autograd.grad(uneven, x, allow_unused=True)
    if gradient is None or not bool(gradient.any()):
        raise UsageError(f"{kind} has no gradient: a sign needs an estimator, such as x + (sign(x) - x).detach()")
    if not bool(gradient.isfinite().all()):
        raise UsageError(f"{kind} has a gradient that is not finite")


def changes_in_place(model: nn.Module) -> bool:
    """Whether quantizers keep what changes over the training in buffers that stay where they are.

    A step that is recorded once, and then replayed, sees no other change. What was registered breaks no promise if it
    does otherwise, so copies of the quantizers are tried.
    """
    return all(_stays(copy.deepcopy(module)) for module in model.modules() if isinstance(module, Quantizer))


def _stays(quantizer: Quantizer) -> bool:
    """Whether progress changes nothing of a quantizer but the contents of its tensors."""
    found = []
    for progress in (0.25, 0.75):
        quantizer.set_progress(progress)
        found.append(_held(quantizer))
    before, after = found
    return before.keys() == after.keys() and all(_same(value, after[name]) for name, value in before.items())


def _held(quantizer: Quantizer) -> dict[str, object]:
    """What a quantizer and its parts hold, by name: tensors themselves, all else as bytes."""
    held: dict[str, object] = {}
    for path, module in quantizer.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in vars(nn.Module())}
        for name, value in {**own, **module._parameters, **module._buffers}.items():
            held[f"{path}.{name}"] = value if isinstance(value, Tensor) else _plain(value)
    return held


def _plain(value: object) -> object:
    """An object as bytes, which other contents make others; where there are none, such as of a function, itself."""
    try:
        return pickle.dumps(value)
    except Exception:  # whatever a class of somebody's own may do
        return value


def _same(one: object, other: object) -> bool:
    """Whether what is held is what it was: a tensor the same one, whatever its values."""
    return one is other or (isinstance(one, bytes) and isinstance(other, bytes) and one == other)
