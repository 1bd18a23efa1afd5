"""The published formulation in plain torch operations: what the speed and gradients of training are compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biper.models import Network, create_model
from biper.nn.functional import binary_sign, sine, square_wave
from biper.nn.layers import BinaryConv2d, RealConv2d, RealLinear, binary_layers
from biper.nn.quantizers import Periodic


class PublishedConv2d(BinaryConv2d):
    """Each operation by itself, and every tensor kept that one of them needs again."""

    def forward(self, a: Tensor) -> Tensor:
        """a: (N, C_in, H, W) -> (N, C_out, H', W')."""
        if self.input_quantizer is not None:
            if self.training:
                a = a / torch.sqrt(a.var(dim=(1, 2, 3), keepdim=True) + 1e-5)
            a = binary_sign(a)
        quantizer = self.weight_quantizer
        assert isinstance(quantizer, Periodic)
        w = (square_wave if quantizer.binary else sine)(self.weight, quantizer.freq)
        return F.conv2d(a, w, None, self.stride, self.padding, groups=self.groups) * self.alpha


PLAIN = {BinaryConv2d: PublishedConv2d, RealConv2d: nn.Conv2d, RealLinear: nn.Linear}


def published_model(name: str, family: str, num_classes: int, stage: int) -> Network:
    """A freshly initialized network whose layers are plain ones, with the parameters that create_model gives."""
    network = create_model(name, family=family, num_classes=num_classes, freq=20.0, stage=stage)
    for module in network.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return network


def published_regularizer(model: nn.Module, tau: float) -> Tensor:
    """The periodic regularizer layer by layer, each with its wait for the device."""
    total = next(model.parameters()).new_zeros(())
    for _, layer in binary_layers(model):
        penalty = layer.weight_quantizer.real(layer.weight).square().mean()
        penalty.item()
        total = total + penalty
    return tau * total
