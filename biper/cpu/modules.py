"""The modules of a rewritten network: what rewriting.py puts in the place of its layers. They own no parameters."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biper.cpu import functions
from biper.nn.layers import BinaryConv2d


class Sums(nn.Module):
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
    """alpha, batch norm, skip, hardtanh and sign, as far as they are there."""

    def __init__(self, norm: nn.BatchNorm2d, layer: BinaryConv2d | None, turned: bool, clamp: bool) -> None:
        super().__init__()
        self.norm, self.layer, self.turned, self.clamp = norm, layer, turned, clamp
        self.signs, self.activations = False, True  # what of the two is used

    def forward(self, u: Tensor, skip: Tensor | None = None) -> functions.Outputs:
        """u, skip: (N, C, H, W) -> activations, signs."""
        alpha: Tensor | None = self.layer.output_scale() if self.layer else None
        if alpha is not None and self.turned:
            alpha = alpha.abs()
        if not self.norm.training and torch.is_grad_enabled():  # frozen: the kernels' gradient is a batch's
            return self._plain(u, alpha, skip)
        signs = sign_type() if self.signs else None
        return functions.unit(u, alpha, self.norm, skip, clamp=self.clamp, signs=signs, activations=self.activations)

    def _plain(self, u: Tensor, alpha: Tensor | None, skip: Tensor | None) -> functions.Outputs:
        a = self.norm(u.float() if alpha is None else u.float() * alpha)
        a = a if skip is None else a + skip
        a = F.hardtanh(a) if self.clamp else a
        return a, functions.standardized_signs(a, sign_type()) if self.signs else None


class BiperSigns(nn.Module):
    """The standardized sign of activations that no unit made, in the type that autocast asks for."""

    def forward(self, a: Tensor) -> Tensor:
        """a: (N, C, H, W), and so is what comes out."""
        return functions.standardized_signs(a.float(), sign_type())


class Signs(nn.Module):
    """What a layer's own input quantizer makes of activations, in the type that autocast asks for."""

    def __init__(self, layer: BinaryConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, a: Tensor) -> Tensor:
        """a: (N, C, H, W), and so is what comes out."""
        return self.layer.quantized_input(a.float()).to(sign_type())


def sign_type() -> torch.dtype:
    """The type in which the convolutions of this pass compute."""
    return torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
