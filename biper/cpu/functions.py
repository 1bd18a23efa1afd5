"""The training step's CPU kernels (cpu/training.c) as differentiable functions. Tensors: float32, channels-last."""

import ctypes
from functools import cache
from typing import Any, cast

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
    "biper_forward": [_POINTER] * 8 + [_FLAG] * 3 + _SHAPE,
    "biper_backward": [_POINTER] * 8 + [_FLAG] * 3 + _SHAPE,
    "biper_norm_backward": [_POINTER] * 6 + [_DOUBLE] + [_POINTER] * 3 + [_FLAG, *_SHAPE],
    "biper_weights": [_POINTER, _FLOAT, _FLAG, _POINTER, _SIZE, _FLAG],
    "biper_weights_backward": [_POINTER, _POINTER, _FLOAT, _POINTER, _SIZE, _FLAG],
    "biper_regularizer": [_POINTER, _FLOAT, _POINTER, _SIZE],
    "biper_regularizer_backward": [_POINTER, _FLOAT, _FLOAT, _POINTER, _SIZE],
}


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
        norm: nn.BatchNorm2d,
        clamp: bool,
        signs: torch.dtype | None,
        narrow: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        u, skip = cast(Tensor, _dense(u)), _dense(skip)
        shape = n, _, c, _ = _shape(u, u.dtype == torch.bfloat16)
        if norm.training:
            kept, scratch = weight.new_empty(3, c), weight.new_empty(n, 2, c)
            running = norm.running_mean, norm.running_var, norm.momentum, norm.eps
            _call("biper_statistics", u, alpha, weight, *running, kept, scratch, *shape)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
        else:
            kept, bias = _running(norm)
        half = signs == torch.bfloat16
        how = clamp, half, narrow and half
        a = torch.empty_like(u, dtype=signs if narrow else torch.float32)
        s = torch.empty_like(u, dtype=signs) if signs else None
        moments = weight.new_empty(n, 2)
        scale = None if norm.training else alpha
        _call("biper_forward", u, scale, kept, bias, skip, a, s, moments, *how, *shape)
        ctx.save_for_backward(u, alpha, weight, a, moments, kept)
        ctx.shape, ctx.how, ctx.eps, ctx.has_skip = shape, how, norm.eps, skip is not None
        return None if narrow else a, s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_a: Tensor | None, grad_s: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        u, alpha, weight, a, moments, kept = ctx.saved_tensors
        n, _, c, _ = ctx.shape
        grad, sums = torch.empty_like(a), weight.new_empty(n, 2, c)
        given = _dense(grad_s), _dense(grad_a), a, moments, u, kept
        _call("biper_backward", *given, grad, sums, *ctx.how, *ctx.shape)
        grad_u, parameters, scratch = torch.empty_like(u), weight.new_empty(3, c), weight.new_empty(3, c)
        given = grad, u, sums, kept, alpha, weight
        _call("biper_norm_backward", *given, ctx.eps, grad_u, parameters, scratch, ctx.how[-1], *ctx.shape)
        grad_alpha = None if alpha is None else parameters[0].view_as(alpha)
        return grad_u, grad_alpha, parameters[1], parameters[2], grad if ctx.has_skip else None, *[None] * 4


def _running(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What the statistics kernel gives in training, from the running statistics; the mean is in the bias."""
    gain, shift = fold_norm(norm)
    nothing = torch.zeros_like(gain)
    return torch.stack([nothing, nothing, gain]), shift


class _Signs(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ANN401
        a = cast(Tensor, _dense(a))
        ctx.shape, ctx.how = _shape(a, False), (False, dtype == torch.bfloat16, False)
        s, moments = torch.empty_like(a, dtype=dtype), a.new_empty(len(a), 2)
        _call("biper_forward", None, None, None, None, a, None, s, moments, *ctx.how, *ctx.shape)
        ctx.save_for_backward(a, moments)
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_s: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        a, moments = ctx.saved_tensors
        grad = torch.empty_like(a)
        _call("biper_backward", _dense(grad_s), None, a, moments, None, None, grad, None, *ctx.how, *ctx.shape)
        return grad, None


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
    clamp: bool,
    signs: torch.dtype | None,
    activations: bool,
) -> Outputs:
    """norm(alpha*u) + skip, through the hardtanh if clamp, in float32; and its standardized sign.

    u: (N, C, H, W), a convolution's sums, float32 or bfloat16; alpha: (C, 1, 1). signs: the type of the signs, bfloat16
    if u is; None if they are not wanted, as activations says of the others. One pass for the batch statistics, one for
    all the rest; in the backward pass one for the gradient of the variance, and two. Raises ValueError in training on
    one value a channel, which has no variance.
    """
    if norm.training and u.numel() <= u.shape[1]:
        raise ValueError(f"batch norm needs more than one value per channel in training, got input of {list(u.shape)}")
    if skip is not None:
        skip = skip.float().expand_as(u)
    narrow = signs is not None and not activations and skip is None
    return cast(Outputs, _Unit.apply(u, alpha, norm.weight, norm.bias, skip, norm, clamp, signs, narrow))


def standardized_signs(a: Tensor, dtype: torch.dtype) -> Tensor:
    """standardized_sign of float32 activations (N, C, H, W), in another type."""
    return cast(Tensor, _Signs.apply(a, dtype))


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
