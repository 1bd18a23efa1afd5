"""The training step's CPU kernels (cpu/training.c) as differentiable functions. Tensors: float32, channels-last."""

import ctypes
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from biper.cpu.compiler import load
from biper.nn.layers import BinaryConv2d
from biper.nn.norms import fold_norm
from biper.nn.quantizers import Sine, SquareWave

LANES = 16  # the kernels take channels, and weights, in multiples of it
_POINTER, _SIZE, _FLAG, _FLOAT, _DOUBLE = (
    ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_double,
)  # fmt: skip
_SHAPE = [_SIZE] * 3 + [_FLAG]  # images, pixels, channels; whether convolutions take and give bfloat16
SIGNATURES: dict[str, list[Any]] = {
    "biper_statistics": [_POINTER] * 5 + [_DOUBLE] * 2 + [_POINTER] * 2 + _SHAPE,
    "biper_forward": [_POINTER] * 12 + [_FLAG] * 4 + _SHAPE,
    "biper_backward": [_POINTER] * 11 + [_FLOAT] + [_POINTER] * 3 + [_FLAG] * 4 + _SHAPE,
    "biper_channel_gradients": [_POINTER] * 2 + [_SIZE] * 2,
    "biper_norm_backward": [_POINTER] * 6 + [_DOUBLE] + [_POINTER] * 3 + [_FLAG, *_SHAPE],
    "biper_weights": [_POINTER, _FLOAT, _FLAG, _POINTER, _SIZE, _FLAG],
    "biper_weights_backward": [_POINTER, _POINTER, _FLOAT, _POINTER, _SIZE, _FLAG],
    "biper_regularizer": [_POINTER, _FLOAT, _POINTER, _SIZE],
    "biper_regularizer_backward": [_POINTER, _FLOAT, _FLOAT, _POINTER, _SIZE],
}
SUMS = 5  # that the backward kernel adds up for every image and channel


class ActivationKind(IntEnum):
    """The activations that the kernels know, by training.c's numbers."""

    NONE, HARDTANH, PRELU = range(3)


class Surrogate(IntEnum):
    """The gradients of signs that the kernels know, by training.c's numbers.

    Of a sample's standardized polynomial, the polynomial, the clipped identity and the error decay estimator.
    """

    STANDARDIZED, POLYNOMIAL, CLIPPED, DECAY = range(4)


class Activation(NamedTuple):
    """What follows a unit's sum. A PReLU's slope, and the shifts before and after it if it has them: C numbers each."""

    kind: ActivationKind = ActivationKind.NONE
    slope: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None


class Estimator(NamedTuple):
    """How signs are taken: their gradient, the C thresholds from which on they are +1, and the error decay's t."""

    kind: Surrogate
    threshold: Tensor | None = None
    t: float = 1.0


STANDARDIZED = Estimator(Surrogate.STANDARDIZED)


class _How(NamedTuple):
    """What a unit computes beside its tensors; signs is their type, None if they are not wanted."""

    activation: ActivationKind
    surrogate: Surrogate
    t: float
    signs: torch.dtype | None
    activations: bool
    narrow: bool

    @property
    def flags(self) -> tuple[int, int, int, int]:
        """As the kernels take them."""
        half = self.signs == torch.bfloat16
        return self.activation, self.surrogate, half, half and self.narrow


@cache
def compiled_kernels() -> ctypes.CDLL:
    """The compiled kernels. Raises CompilerMissing."""
    compiled = load("training")
    for name, arguments in SIGNATURES.items():
        getattr(compiled, name).argtypes = arguments
        getattr(compiled, name).restype = None
    compiled.biper_regularizer.restype = _DOUBLE
    return compiled


def _call(name: str, *arguments: Tensor | float | None) -> Any:  # noqa: ANN401
    """Call a kernel with the addresses of the tensors."""
    return getattr(compiled_kernels(), name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


def _dense(x: Tensor | None) -> Tensor | None:
    layout = torch.channels_last if x is not None and x.dim() == 4 else torch.contiguous_format
    return None if x is None else x.contiguous(memory_format=layout)


def _shape(x: Tensor, half: bool) -> tuple[int, int, int, int]:
    n, c, h, w = x.shape
    return n, h * w, c, int(half)


class _Unit(Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        u: Tensor,
        alpha: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        skip: Tensor | None,
        slope: Tensor | None,
        before: Tensor | None,
        after: Tensor | None,
        threshold: Tensor | None,
        norm: nn.BatchNorm2d,
        how: _How,
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        u, skip = cast(Tensor, _dense(u)), _dense(skip)
        shape = n, _, c, _ = _shape(u, u.dtype == torch.bfloat16)
        shift = bias
        if norm.training:
            kept, scratch = weight.new_empty(3, c), weight.new_empty(n, 2, c)
            running = norm.running_mean, norm.running_var, norm.momentum, norm.eps
            _call("biper_statistics", u, alpha, weight, *running, kept, scratch, *shape)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
        else:
            kept, shift = _running(norm)
        # a PReLU's backward pass computes its input anew, from u and skip, and needs no activations
        recomputed = how.activation == ActivationKind.PRELU
        kept_type = how.signs if how.narrow else torch.float32
        a = torch.empty_like(u, dtype=kept_type) if how.activations or not recomputed else None
        s = torch.empty_like(u, dtype=how.signs) if how.signs else None
        moments = weight.new_empty(n, 2)
        given = None if norm.training else alpha, kept, shift, skip, slope, before, after, threshold
        _call("biper_forward", u, *given, a, s, moments, *how.flags, *shape)
        input_, output = (skip, None) if recomputed else (None, a)
        ctx.save_for_backward(u, alpha, weight, bias, input_, slope, before, after, threshold, output, moments, kept)
        ctx.shape, ctx.how, ctx.eps, ctx.has_skip, ctx.type = shape, how, norm.eps, skip is not None, kept_type
        return None if how.narrow else a, s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_a: Tensor | None, grad_s: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        u, alpha, weight, bias, skip, slope, before, after, threshold, a, moments, kept = ctx.saved_tensors
        n, _, c, _ = ctx.shape
        how: _How = ctx.how
        grad, sums = torch.empty_like(u, dtype=ctx.type), weight.new_empty(n, SUMS, c)
        inputs = u, kept, bias, skip, slope, before, after, threshold, how.t, moments
        _call("biper_backward", _dense(grad_s), _dense(grad_a), a, *inputs, grad, sums, *how.flags, *ctx.shape)
        grad_u, parameters, scratch = torch.empty_like(u), weight.new_empty(3, c), weight.new_empty(3, c)
        _, _, _, narrow = how.flags
        given = grad, u, sums, kept, alpha, weight, ctx.eps, grad_u, parameters, scratch, narrow
        _call("biper_norm_backward", *given, *ctx.shape)
        others = _channel_gradients(sums) if slope is not None or threshold is not None else [None] * 3
        # a shift before the PReLU is the norm's bias, with the other sign
        of_alpha, of_before = _shaped(parameters[0], alpha), None if before is None else -_shaped(parameters[2], before)
        of_threshold, of_after = _shaped(others[0], threshold), _shaped(others[1], after)
        of_skip, of_slope = grad if ctx.has_skip else None, _shaped(others[2], slope)
        of_norm = parameters[1], parameters[2]
        return grad_u, of_alpha, *of_norm, of_skip, of_slope, of_before, of_after, of_threshold, None, None


def _channel_gradients(sums: Tensor) -> Tensor:
    """Of thresholds, shifts after a PReLU and its slopes: (3, C)."""
    n, _, c = sums.shape
    gradients = sums.new_empty(3, c)
    _call("biper_channel_gradients", sums, gradients, n, c)
    return gradients


def _shaped(gradient: Tensor | None, like: Tensor | None) -> Any:  # noqa: ANN401
    """A gradient of C numbers in the shape of what it belongs to, if that is there."""
    return None if gradient is None or like is None else gradient.view_as(like)


def _running(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What the statistics kernel gives in training, from the running statistics; the mean is in the bias."""
    gain, shift = fold_norm(norm)
    nothing = torch.zeros_like(gain)
    return torch.stack([nothing, nothing, gain]), shift


class _Signs(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, threshold: Tensor | None, how: _How) -> Tensor:  # noqa: ANN401
        a = cast(Tensor, _dense(a))
        ctx.shape, ctx.how = _shape(a, False), how
        s, moments = torch.empty_like(a, dtype=how.signs), a.new_empty(len(a), 2)
        nothing = [None] * 3
        _call("biper_forward", *nothing, None, a, *nothing, threshold, None, s, moments, *how.flags, *ctx.shape)
        ctx.save_for_backward(a, threshold, moments)
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_s: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        a, threshold, moments = ctx.saved_tensors
        n, _, c, _ = ctx.shape
        grad, sums = torch.empty_like(a), None if threshold is None else a.new_empty(n, SUMS, c)
        given = *[None] * 7, threshold, ctx.how.t, moments
        _call("biper_backward", _dense(grad_s), None, a, *given, grad, sums, *ctx.how.flags, *ctx.shape)
        return grad, None if sums is None else _shaped(_channel_gradients(sums)[0], threshold), None


class _Weights(Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, freq: float, binary: bool, dtype: torch.dtype) -> Tensor:  # noqa: ANN401
        w = cast(Tensor, _dense(w))
        out = torch.empty_like(w, dtype=dtype)
        _call("biper_weights", w, freq, binary, out, w.numel(), dtype == torch.bfloat16)
        ctx.save_for_backward(w)
        ctx.freq = freq
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (w,) = ctx.saved_tensors
        grad_w, half = torch.empty_like(w), grad.dtype == torch.bfloat16
        _call("biper_weights_backward", _dense(grad), w, ctx.freq, grad_w, w.numel(), half)
        return grad_w, None, None, None


class _Regularizer(Function):
    @staticmethod
    def forward(ctx: Any, freqs: list[float], *weights: Tensor) -> Tensor:  # noqa: ANN401
        total = 0.0
        weights = tuple(cast(Tensor, _dense(w)) for w in weights)
        for freq, w in zip(freqs, weights, strict=True):
            blocks = w.new_empty(w.numel() // 4096 + 1)
            total += _call("biper_regularizer", w, freq, blocks, w.numel()) / w.numel()
        ctx.save_for_backward(*weights)
        ctx.freqs = freqs
        return torch.tensor(total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        grads = []
        for freq, w in zip(ctx.freqs, ctx.saved_tensors, strict=True):
            grads.append(torch.empty_like(w))
            _call("biper_regularizer_backward", w, freq, grad.item() / w.numel(), grads[-1], w.numel())
        return None, *grads


Outputs = tuple[Tensor | None, Tensor | None]  # activations and signs


def unit(
    u: Tensor,
    alpha: Tensor | None,
    norm: nn.BatchNorm2d,
    skip: Tensor | None,
    *,
    activation: Activation = Activation(),  # noqa: B008
    estimator: Estimator = STANDARDIZED,
    signs: torch.dtype | None,
    activations: bool,
) -> Outputs:
    """activation(norm(alpha*u) + skip) in float32, and its signs, differentiable in parameters and thresholds too.

    u: (N, C, H, W), a convolution's sums, float32 or bfloat16; alpha: (C, 1, 1). signs: the type of the signs, bfloat16
    if u is; None if they are not wanted, as activations says of the others. One pass for the batch statistics, one for
    all the rest; in the backward pass two, and one more for the gradient of a standardized sign's variance. Raises
    ValueError in training on one value a channel, which has no variance.
    """
    if norm.training and u.numel() <= u.shape[1]:
        raise ValueError(f"batch norm needs more than one value per channel in training, got input of {list(u.shape)}")
    if skip is not None:
        skip = skip.float().expand_as(u)
    kind, slope, before, after = activation
    slope = None if slope is None else slope.expand(u.shape[1]).contiguous()
    narrow = signs is not None and not activations and skip is None
    how = _How(kind, estimator.kind, estimator.t, signs, activations, narrow)
    given = u, alpha, norm.weight, norm.bias, skip, slope, before, after, estimator.threshold
    return cast(Outputs, _Unit.apply(*given, norm, how))


def signs_of(a: Tensor, estimator: Estimator, dtype: torch.dtype) -> Tensor:
    """The signs of float32 activations (N, C, H, W), in another type."""
    how = _How(ActivationKind.NONE, estimator.kind, estimator.t, dtype, False, False)
    return cast(Tensor, _Signs.apply(a, estimator.threshold, how))


def periodic_weights(w: Tensor, freq: float, binary: bool, dtype: torch.dtype) -> Tensor:
    """sin(freq*w), or the square wave of the same period if binary, of w's shape, in another type."""
    return cast(Tensor, _Weights.apply(w, freq, binary, dtype))


def quantized_weight(layer: BinaryConv2d, dtype: torch.dtype) -> Tensor:
    """The weights that a layer convolves with, in another type; BiPer's by the kernels, all others by torch."""
    w, quantizer = layer.weight, layer.weight_quantizer
    if isinstance(quantizer, Sine | SquareWave) and type(quantizer) in (Sine, SquareWave):
        return periodic_weights(w, quantizer.freq, quantizer.binary, dtype)
    weight: Tensor = layer.weight_quantizer(w)
    return weight.to(dtype)


def mean_squared_sines(latent: list[Tensor], freqs: list[float]) -> Tensor:
    """The sum over the layers of mean(sin(freq*w)**2), a scalar. Latent weights: dense, of any shape."""
    return cast(Tensor, _Regularizer.apply(freqs, *latent))
