"""Quantizers that others have published, to compare BiPer's with: weights by XNOR, IR-Net and ReCU, inputs by two more.

All give -1 and +1 with sign(0) = +1, where the published codes have torch.sign, whose sign(0) is 0. A scale of their
own multiplies the sums, beside the layer's learned alpha, which every quantizer has here: so they differ in nothing
else than how a weight becomes binary.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from biper.errors import UsageError
from biper.nn.functional import error_decay_sign, identity_sign, straight_through_sign, threshold_sign
from biper.nn.quantizers import InputQuantizer, WeightQuantizer, register_quantizer

EPSILON = 1e-5  # of ReCU's published variance


def channel_mean(w: Tensor) -> Tensor:
    """The mean of each output channel's weights: (C_out, ...) -> (C_out, 1, ...)."""
    return w.mean(tuple(range(1, w.dim())), keepdim=True)


class _Standardized(Function):
    """One node, which keeps its results alone: v, and 1 / std, which is there for the derivative of v's gradient."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        dims, ctx.degrees = tuple(range(1, w.dim())), max(1, w[0].numel() - 1)
        mean = w.mean(dims, keepdim=True)
        v = w - mean
        variance = v.square().sum(dims, keepdim=True).div_(ctx.degrees).add_(epsilon)  # unbiased; 0 of a single weight
        rounding = (8 * torch.finfo(w.dtype).eps * mean).square()  # what a mean of equal weights may be off
        inverse = torch.where(variance > rounding, variance.rsqrt(), 0.0)
        v = v * inverse  # not in place, for torch.compile (functional._signs)
        ctx.save_for_backward(v, inverse)
        ctx.set_materialize_grads(False)
        return v, inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_inverse: Tensor | None) -> tuple[Tensor | None, None]:  # noqa: ANN401
        v, inverse = cast(tuple[Tensor, ...], ctx.saved_tensors)
        dims, grad_w = tuple(range(1, v.dim())), None
        if grad is not None:
            dot = (grad * v).sum(dims, keepdim=True).div_(ctx.degrees)
            grad_w = torch.addcmul(grad - grad.mean(dims, keepdim=True), v, dot, value=-1).mul_(inverse)
        if grad_inverse is not None:
            other = -grad_inverse * inverse.square() * v / ctx.degrees
            grad_w = other if grad_w is None else grad_w + other
        return grad_w, None


def standardized(w: Tensor, epsilon: float = 0.0) -> Tensor:
    """(w - mean) / sqrt(variance + epsilon) of each output channel: (C_out, ...), and so is what comes out.

    0, and so is the gradient, of a channel whose weights are all equal where epsilon is 0.
    """
    v, _ = cast(tuple[Tensor, Tensor], _Standardized.apply(w, epsilon))
    return v


@register_quantizer("xnor")
class XNOR(WeightQuantizer):
    """sign(w), times the mean of |w| over the output channel; gradient of the sign 1 where |w| <= 1, else 0.

    The gradient flows through the mean too, as the product rule says: the paper's text has the term 1/n of a weight's
    own share alone, its code the sum over the channel, as here, times a further factor n*(1 - 1/C_in), which Adam
    ignores. Before each step the code also takes the mean over the input channels off the latent weights and clamps
    them to [-1, 1], which is not done here; nor is the paper's scale K of the inputs, which its code leaves out too.
    [Rastegari et al. 2016, XNOR-Net, arXiv 1603.05279, sections 3.1 and 3.2]
    """

    def forward(self, w: Tensor) -> Tensor:
        """w: (C_out, ...)."""
        return straight_through_sign(w)

    def scale(self, w: Tensor) -> Tensor:
        """mean |w| of each channel."""
        return channel_mean(w.abs())


class _ErrorDecay:
    """IR-Net's schedule: t from t_min to t_max, evenly in its logarithm, and k = max(1/t, 1).

    The paper's text has t_min = 0.1; its code for ResNet-20 begins at 0.001. The code changes t from epoch to epoch, we
    from step to step.
    """

    def __init__(self, t_min: float = 0.1, t_max: float = 10.0) -> None:
        super().__init__()
        if not 0 < t_min <= t_max < math.inf:
            raise UsageError(f"the error decay estimator takes 0 < t_min <= t_max, not {t_min!r} and {t_max!r}")
        self.t_min, self.t_max = t_min, t_max
        assert isinstance(self, nn.Module)
        self.register_buffer("t", torch.tensor(t_min, dtype=torch.float32), persistent=False)

    t: Tensor  # a scalar

    def set_progress(self, progress: float) -> None:
        """t_min at 0, t_max at 1."""
        self.t.fill_(self.t_min * (self.t_max / self.t_min) ** progress)


@register_quantizer("irnet")
class IRNet(_ErrorDecay, WeightQuantizer):
    """sign(v) of the balanced and standardized v = (w - mean(w)) / std(w), times 2**round(log2(mean |v|)).

    Mean, std (unbiased) and scale are those of the output channel. Gradient of the sign k*t*(1 - tanh(t*v)**2); t and k
    change over training, see the schedule's settings t_min and t_max; none flows through the scale.
    [Qin et al. 2020, IR-Net, arXiv 1909.10788, sections 3.2 and 3.3]
    """

    def forward(self, w: Tensor) -> Tensor:
        """w: (C_out, ...)."""
        return error_decay_sign(self.real(w), self.t)

    def real(self, w: Tensor) -> Tensor:
        """v; 0 where all weights of a channel are equal."""
        return standardized(w)

    @torch.no_grad()
    def scale(self, w: Tensor) -> Tensor:
        """The power of two that is closest, by its logarithm, to the mean of |v|."""
        mean = channel_mean(self.real(w).abs())
        return torch.where(mean > 0, mean.log2().round().exp2(), 1.0)


@register_quantizer("recu")
class ReCU(WeightQuantizer):
    """sign(r) of r = clamp(v, -q, q) with v = (w - mean(w)) / std(w); gradient of the sign 1, so 0 outside of [-q, q].

    q is the tau-quantile of a Laplace distribution of v's mean magnitude over the layer, -mean|v| * ln(2 - 2*tau), and
    a constant of the gradient; tau goes from tau_min at progress p = 0 to tau_max at 1, as A*exp(p) + B. Mean and std
    are those of the output channel. The paper's text standardizes as here; its code divides std by 2*sqrt(2) and adds
    1e-5 to the variance, which makes all of v, and the gradient with respect to w, 2*sqrt(2) times as large: we do as
    the code does. The code changes tau from epoch to epoch, we from step to step.
    [Xu et al. 2021, ReCU, arXiv 2103.12369, section 3; tau's schedule section 3.3]
    """

    tau: Tensor  # a scalar

    def __init__(self, tau_min: float = 0.85, tau_max: float = 0.99) -> None:
        super().__init__()
        if not 0.5 < tau_min <= tau_max < 1:
            raise UsageError(f"ReCU takes 0.5 < tau_min <= tau_max < 1, not {tau_min!r} and {tau_max!r}")
        self.tau_min, self.tau_max = tau_min, tau_max
        self.register_buffer("tau", torch.tensor(tau_min, dtype=torch.float32), persistent=False)

    def set_progress(self, progress: float) -> None:
        """tau_min at 0, tau_max at 1."""
        slope = (self.tau_max - self.tau_min) / (math.e - 1)
        self.tau.fill_(slope * math.exp(progress) + self.tau_min - slope)

    def forward(self, w: Tensor) -> Tensor:
        """w: (C_out, ...)."""
        return identity_sign(self.real(w))

    def real(self, w: Tensor) -> Tensor:
        """r."""
        v = 8**0.5 * standardized(w, EPSILON)
        limit = -v.detach().abs().mean() * torch.log(2 - 2 * self.tau.to(v.dtype))
        return torch.clamp(v, -limit, limit)


@register_quantizer("rsign")
class RSign(InputQuantizer):
    """+1 where a >= threshold, else -1, with a threshold for each channel, learned, 0 at first.

    Gradient max(0, 2 - 2*|a - threshold|), Bi-Real Net's, for the threshold with the other sign, summed up. The paper
    has +1 for a > threshold alone, and its code adds the threshold's negative as a bias.
    [Liu et al. 2020, ReActNet, arXiv 2003.03488, section 4.2]
    """

    def fit(self, shape: tuple[int, ...]) -> None:
        """Make the thresholds."""
        self.threshold = nn.Parameter(torch.zeros(shape))

    def forward(self, a: Tensor) -> Tensor:
        """a: (N, C, H, W), or (N, ..., C) in a linear layer."""
        if self.threshold is None:
            raise UsageError(
                "RSign learns a threshold for each channel: give it to a layer, or call fit((C, 1, 1)) first"
            )
        return threshold_sign(a, self.threshold)


@register_quantizer("irnet")
class ErrorDecaySign(_ErrorDecay, InputQuantizer):
    """sign(a); gradient k*t*(1 - tanh(t*a)**2), where t and k change over training as those of IRNet's weights.

    [Qin et al. 2020, IR-Net, arXiv 1909.10788, section 3.3]
    """

    def forward(self, a: Tensor) -> Tensor:
        """Any shape, and so is what comes out."""
        return error_decay_sign(a, self.t)
