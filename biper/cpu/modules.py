"""The modules of a rewritten network: what rewriting.py puts in the place of its layers. They own no parameters."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biper.cpu import functions
from biper.cpu.functions import Activation, ActivationKind, Estimator, Surrogate
from biper.nn.activations import RPReLU
from biper.nn.comparison_quantizers import ErrorDecaySign, RSign
from biper.nn.layers import BinaryConv2d
from biper.nn.quantizers import InputQuantizer, PolynomialSign, Sign

FUSED_ACTIVATIONS = (nn.Hardtanh, nn.PReLU, RPReLU)  # by the kernels: to [-1, 1], with one slope or one a channel
FUSED_QUANTIZERS = (PolynomialSign, Sign, RSign, ErrorDecaySign)  # of inputs, that they know


class BinarySums(nn.Module):
    """A binary convolution from signs to sums, before alpha, in the type of the signs."""

    def __init__(self, layer: BinaryConv2d, turned: bool) -> None:
        super().__init__()
        self.layer, self.turned = layer, turned

    def forward(self, s: Tensor) -> Tensor:
        """s: (N, C_in, H, W) -> (N, C_out, H', W')."""
        layer = self.layer
        if layer.training:
            layer.watch(s)
        w = functions.quantized_weight(layer, s.dtype)
        if self.turned:  # so that a maximum taken of the sums is the one that alpha's sign would choose
            w = w * torch.where(layer.alpha < 0, -1.0, 1.0).to(w.dtype)[..., None]  # (C_out, 1, 1, 1)
        return F.conv2d(s, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)


class Unit(nn.Module):
    """alpha, batch norm, skip, activation and sign, as far as they are there."""

    def __init__(
        self, norm: nn.BatchNorm2d, layer: BinaryConv2d | None, turned: bool, activation: nn.Module | None
    ) -> None:
        super().__init__()
        self.norm, self.layer, self.turned, self.activation = norm, layer, turned, activation
        self.quantizer: InputQuantizer | None = None  # whose signs are used, if any
        self.activations = True  # whether those are

    def forward(self, u: Tensor, skip: Tensor | None = None) -> functions.Outputs:
        """u, skip: (N, C, H, W) -> activations, signs."""
        alpha: Tensor | None = self.layer.output_scale() if self.layer else None
        if alpha is not None and self.turned:
            alpha = alpha.abs()
        if not self.norm.training and torch.is_grad_enabled():  # frozen: the kernels' gradient is a batch's
            return self._plain(u, alpha, skip)
        return functions.unit(
            u,
            alpha,
            self.norm,
            skip,
            activation=activation_of(self.activation),
            estimator=functions.STANDARDIZED if self.quantizer is None else estimator_of(self.quantizer),
            signs=None if self.quantizer is None else sign_type(),
            activations=self.activations,
        )

    def _plain(self, u: Tensor, alpha: Tensor | None, skip: Tensor | None) -> functions.Outputs:
        a: Tensor = self.norm(u.float() if alpha is None else u.float() * alpha)
        a = a if skip is None else a + skip
        a = a if self.activation is None else self.activation(a)
        return a, None if self.quantizer is None else signs_of(a, self.quantizer)


class KernelSigns(nn.Module):
    """The signs of activations that no unit makes, in the type that autocast asks for."""

    def __init__(self, quantizer: InputQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, a: Tensor) -> Tensor:
        """a: (N, C, H, W), and so is what comes out."""
        return signs_of(a, self.quantizer)


class Signs(nn.Module):
    """What an input quantizer unknown to the kernels makes of activations, in the type that autocast asks for."""

    def __init__(self, layer: BinaryConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, a: Tensor) -> Tensor:
        """a: (N, C, H, W), and so is what comes out."""
        return self.layer.quantized_input(a.float()).to(sign_type())


def sign_type() -> torch.dtype:
    """The type in which the convolutions of this pass compute."""
    return torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32


def signs_of(a: Tensor, quantizer: InputQuantizer) -> Tensor:
    """What a quantizer that the kernels know makes of activations (N, C, H, W), in sign_type()."""
    return functions.signs_of(a.float(), estimator_of(quantizer), sign_type())


def activation_of(module: nn.Module | None) -> Activation:
    """One of FUSED_ACTIVATIONS, or none, as the kernels take it."""
    if isinstance(module, RPReLU):
        return Activation(ActivationKind.PRELU, module.weight, module.before, module.after)
    if isinstance(module, nn.PReLU):
        return Activation(ActivationKind.PRELU, module.weight)
    return Activation(ActivationKind.NONE if module is None else ActivationKind.HARDTANH)


def estimator_of(quantizer: InputQuantizer) -> Estimator:
    """One of FUSED_QUANTIZERS, as the kernels take it, in its present mode."""
    if isinstance(quantizer, ErrorDecaySign):
        return Estimator(Surrogate.DECAY, t=quantizer.t.item())
    if isinstance(quantizer, Sign):
        return Estimator(Surrogate.CLIPPED)
    if isinstance(quantizer, PolynomialSign) and quantizer.standardized and quantizer.training:
        return functions.STANDARDIZED
    return Estimator(Surrogate.POLYNOMIAL, quantizer.threshold)
