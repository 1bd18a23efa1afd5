"""The blocks of the ResNets; how the shape changes in a skip is each family's own."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from biper.models.registry import Precision

Layer = TypeVar("Layer", bound=nn.Module)
NO_WEIGHT_DECAY = "no_weight_decay"


def without_weight_decay(layer: Layer) -> Layer:
    """Mark a convolution or linear layer that the published training leaves out of ImageNet's weight decay."""
    setattr(layer, NO_WEIGHT_DECAY, True)
    return layer


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm; the base of the two ways to skip them."""

    skip: Callable[[Tensor], Tensor]  # (N, C_in, H, W) -> (N, C_out, H/stride, W/stride), rounded up

    def __init__(self, in_channels: int, channels: int, stride: int, precision: Precision) -> None:
        super().__init__()
        self.conv1 = precision.conv(in_channels, channels, 3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.activation1 = precision.activation(channels)
        self.conv2 = precision.conv(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.activation2 = precision.activation(channels)


class DoubleSkip(Block):
    """One skip around each convolution, as in Bi-Real Net."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C_in, H, W) -> (N, C_out, H/stride, W/stride)."""
        out = self.activation1(self.bn1(self.conv1(x)) + self.skip(x))
        result: Tensor = self.activation2(self.bn2(self.conv2(out)) + out)
        return result
