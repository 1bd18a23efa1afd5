"""Binarizations and their surrogate gradients: maths only.

BiPer's weights take the square wave of period 2*pi/freq, with the sine of the same period as surrogate; its activations
the sign, with a piecewise polynomial as surrogate. Binary means two values: sign(0) is +1.
On the CPU training runs BiPer's mathematics in C (cpu/training.c), which tests compare with this one.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

VARIANCE_EPSILON = 1e-5


def _sign(x: Tensor) -> Tensor:
    """+1 where x >= 0 (both zeros included), else -1. Any shape; keeps the dtype."""
    return _signs(x >= 0, x.dtype)


def _signs(positive: Tensor, dtype: torch.dtype) -> Tensor:
    """+1 where True, else -1. Any shape."""
    if torch.compiler.is_compiling():  # which loses the gradient of a result changed in place [seen with torch 2.11]
        return positive.to(dtype) * 2 - 1
    return positive.to(dtype).mul_(2).sub_(1)  # in place: saves memory


def _surrogate(x: Tensor) -> Tensor:
    """max(0, 2 - 2*|x|), the gradient of the sign's surrogate. Any shape."""
    return x.abs().mul_(-2).add_(2).clamp_(min=0)  # in place: saves memory


class _SquareWave(Function):
    @staticmethod
    def forward(w: Tensor, freq: float) -> Tensor:
        return _sign(torch.sin(freq * w))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:  # noqa: ANN401
        w, ctx.freq = inputs
        ctx.save_for_backward(w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        w: Tensor = ctx.saved_tensors[0]
        return grad * torch.cos(ctx.freq * w) * ctx.freq, None


class _BinarySign(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _sign(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ANN401
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401
        x: Tensor = ctx.saved_tensors[0]
        return _surrogate(x).mul_(grad)


class _StraightThroughSign(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _sign(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ANN401
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401
        x: Tensor = ctx.saved_tensors[0]
        return grad * (x.abs() <= 1)


class _IdentitySign(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _sign(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ANN401
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401
        return grad


class _ErrorDecaySign(Function):
    @staticmethod
    def forward(x: Tensor, t: Tensor) -> Tensor:
        return _sign(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ANN401
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        x, t = cast(tuple[Tensor, Tensor], ctx.saved_tensors)
        t = t.to(x.dtype)
        return grad * (1 - torch.tanh(t * x).square()) * (t * (1 / t).clamp(min=1)), None


class _ThresholdSign(Function):
    @staticmethod
    def forward(a: Tensor, threshold: Tensor) -> Tensor:
        # compared, not subtracted: where tiny numbers are taken for zero, the difference of two that differ may be 0
        return _signs(a >= threshold, a.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ANN401
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        a, threshold = cast(tuple[Tensor, Tensor], ctx.saved_tensors)
        grad = _surrogate(a - threshold).mul_(grad)
        return grad, -grad.sum_to_size(threshold.shape)


class _StandardizedSign(Function):
    """One node, which keeps the activations alone: as separate ones they would keep them and two copies."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(a, *_mean_and_inverse(a))
        return _sign(a)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401
        a, mean, inverse = cast(tuple[Tensor, ...], ctx.saved_tensors)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # they have a part in the second derivative
            mean, inverse = _mean_and_inverse(a)
        grad = _surrogate(a * inverse) * grad  # with respect to x = a * inverse
        dot = (grad * a).sum(dim=tuple(range(1, a.dim())), keepdim=True)
        return inverse * grad - (a - mean) * (dot * inverse**3 / max(1, _degrees(a)))


def _degrees(a: Tensor) -> int:
    """Of freedom, of a sample's variance; 0 of a single feature, whose variance is 0."""
    return max(0, math.prod(a.shape[1:]) - 1)


def _mean_and_inverse(a: Tensor) -> tuple[Tensor, Tensor]:
    """Of each sample of a (N, ...): its mean, and 1 / sqrt(var(a) + 1e-5): (N, 1, ...)."""
    dims = tuple(range(1, a.dim()))
    variance, mean = torch.var_mean(a, dim=dims, correction=min(1, _degrees(a)), keepdim=True)
    return mean, torch.rsqrt(variance + VARIANCE_EPSILON)


def sine(w: Tensor, freq: float) -> Tensor:
    """sin(freq*w) in [-1, 1], stage 1's real weight; gradient freq*cos(freq*w).

    Any shape; freq in radians per unit weight. [BiPer, weight binarization]
    """
    return torch.sin(freq * w)


def square_wave(w: Tensor, freq: float) -> Tensor:
    """sign(sin(freq*w)) in {-1, +1}, stage 2's binary weight; gradient freq*cos(freq*w), that of the sine.

    Any shape; freq in radians per unit weight; +1 where the sine is 0. [BiPer, weight binarization]
    """
    return cast(Tensor, _SquareWave.apply(w, freq))


def binary_sign(x: Tensor) -> Tensor:
    """sign(x) in {-1, +1} with sign(0) = +1; gradient max(0, 2 - 2*|x|). Any shape.

    The binary activation; its surrogate is the piecewise polynomial of Bi-Real Net. [BiPer, activation binarization]
    """
    return cast(Tensor, _BinarySign.apply(x))


def standardized_sign(a: Tensor) -> Tensor:
    """sign(x) of x = a / sqrt(var(a) + 1e-5), unbiased variance per sample; gradient max(0, 2 - 2*|x|) * dx/da.

    a: (N, C, H, W). The variance is part of the graph, and no sign changes: only the place where the surrogate's window
    lies. Used in training alone. [BiPer, activation binarization]
    """
    return cast(Tensor, _StandardizedSign.apply(a)) if a.numel() else binary_sign(a)


def straight_through_sign(x: Tensor) -> Tensor:
    """sign(x) in {-1, +1} with sign(0) = +1; gradient 1 where |x| <= 1, else 0 (the clipped identity).

    [Courbariaux et al. 2016, Binarized Neural Networks, arXiv 1602.02830, section 1.3]
    """
    return cast(Tensor, _StraightThroughSign.apply(x))


def identity_sign(x: Tensor) -> Tensor:
    """sign(x) in {-1, +1} with sign(0) = +1; gradient 1 everywhere. Any shape.

    [Bengio et al. 2013, Estimating or Propagating Gradients Through Stochastic Neurons, arXiv 1308.3432]
    """
    return cast(Tensor, _IdentitySign.apply(x))


def error_decay_sign(x: Tensor, t: Tensor) -> Tensor:
    """sign(x) in {-1, +1} with sign(0) = +1; gradient k*t*(1 - tanh(t*x)**2) with k = max(1/t, 1).

    x: any shape; t: a positive scalar. [Qin et al. 2020, IR-Net, arXiv 1909.10788, section 3.3]
    """
    return cast(Tensor, _ErrorDecaySign.apply(x, t))


def threshold_sign(a: Tensor, threshold: Tensor) -> Tensor:
    """+1 where a >= threshold, else -1; gradient max(0, 2 - 2*|a - threshold|), with the other sign for the threshold.

    a: any shape, over which threshold broadcasts. [Liu et al. 2020, ReActNet, arXiv 2003.03488, section 4.2]
    """
    return cast(Tensor, _ThresholdSign.apply(a, threshold))
