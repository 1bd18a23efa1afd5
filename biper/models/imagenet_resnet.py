"""ImageNet ResNets, for images of any size. Stem, 1x1 downsampling, batch norms and classifier are real.

BiPer's, which are those of its published code, and ReActNet's, whose stem and head are plainer.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from biper.models.blocks import DoubleSkip, without_weight_decay
from biper.models.registry import Network, Precision, register_model
from biper.nn.comparison_quantizers import RSign

INITIAL_GAIN = 1e-8  # published: every residual branch starts as almost nothing beside its skip
CHANNELS = (64, 128, 256, 512)


class DownsampledDoubleSkip(DoubleSkip):
    """DoubleSkip whose first skip is a real 1x1 convolution with batch norm where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int, precision: Precision) -> None:
        super().__init__(in_channels, channels, stride, precision)
        self.downsample = nn.Sequential()
        if stride != 1 or in_channels != channels:
            convolution = precision.real_conv(in_channels, channels, 1, stride, bias=False)
            self.downsample.append(without_weight_decay(convolution))
            self.downsample.append(nn.BatchNorm2d(channels))

    def skip(self, x: Tensor) -> Tensor:
        """The first skip."""
        out: Tensor = self.downsample(x)
        return out


class PooledDownsampledDoubleSkip(DoubleSkip):
    """DoubleSkip whose first skip is a mean over 2x2 pixels, a real 1x1 convolution and batch norm where it is strided.

    [Liu et al. 2020, ReActNet, arXiv 2003.03488, after Bi-Real Net]
    """

    def __init__(self, in_channels: int, channels: int, stride: int, precision: Precision) -> None:
        super().__init__(in_channels, channels, stride, precision)
        self.downsample = nn.Sequential()
        if stride != 1 or in_channels != channels:
            convolution = precision.real_conv(in_channels, channels, 1, bias=False)
            if stride != 1:
                self.downsample.append(nn.AvgPool2d(stride, ceil_mode=True))
            self.downsample.append(without_weight_decay(convolution))
            self.downsample.append(nn.BatchNorm2d(channels))

    def skip(self, x: Tensor) -> Tensor:
        """The first skip."""
        out: Tensor = self.downsample(x)
        return out


def add_layers(network: nn.Module, block: type[DoubleSkip], blocks: Sequence[int], precision: Precision) -> list[str]:
    """Give a network its four stages of blocks, of which all but the first begin with stride 2; returns their names."""
    in_channels, names = CHANNELS[0], [f"layer{i + 1}" for i in range(len(blocks))]
    for i, (name, channels) in enumerate(zip(names, CHANNELS, strict=True)):
        strides = [1 if i == 0 else 2] + [1] * (blocks[i] - 1)
        inputs = [in_channels] + [channels] * (blocks[i] - 1)
        members = (block(c, channels, s, precision) for c, s in zip(inputs, strides, strict=True))
        network.add_module(name, nn.Sequential(*members))
        in_channels = channels
    return names


class ImageNetResNet(Network):
    """Real 7x7/2 stem and 3x3/2 max-pool, four stages of blocks, average pool, batch norm, linear."""

    def __init__(self, blocks: Sequence[int], num_classes: int, precision: Precision) -> None:
        super().__init__()
        self.conv1 = precision.real_conv(3, CHANNELS[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS[0])
        self.activation = precision.activation(CHANNELS[0])
        self.layers = add_layers(self, DownsampledDoubleSkip, blocks, precision)
        self.bn2 = nn.BatchNorm1d(CHANNELS[-1])
        self.fc = precision.real_linear(CHANNELS[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d):  # not the head's BatchNorm1d, as published
                nn.init.constant_(module.weight, INITIAL_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) normalized images -> (N, num_classes) logits."""
        x = self.activation(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for name in self.layers:
            x = getattr(self, name)(x)
        x = F.avg_pool2d(x, x.shape[2:]).flatten(1)  # (N, C, H, W) -> (N, C)
        logits: Tensor = self.fc(self.bn2(x))
        return logits


@register_model("imagenet", "resnet18")
def resnet18(num_classes: int, precision: Precision) -> ImageNetResNet:
    """ResNet-18 with double skips, 11.7 M parameters at 1,000 classes."""
    return ImageNetResNet((2, 2, 2, 2), num_classes, precision)


@register_model("imagenet", "resnet34")
def resnet34(num_classes: int, precision: Precision) -> ImageNetResNet:
    """ResNet-34 with double skips, 21.8 M parameters at 1,000 classes."""
    return ImageNetResNet((3, 4, 6, 3), num_classes, precision)


class ReActResNet(Network):
    """Real 7x7/2 stem and 3x3/2 max-pool without an activation, four stages of blocks, average pool, linear."""

    def __init__(self, blocks: Sequence[int], num_classes: int, precision: Precision) -> None:
        super().__init__()
        self.conv1 = precision.real_conv(3, CHANNELS[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS[0])
        self.layers = add_layers(self, PooledDownsampledDoubleSkip, blocks, precision)
        self.fc = precision.real_linear(CHANNELS[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) normalized images -> (N, num_classes) logits."""
        x = F.max_pool2d(self.bn1(self.conv1(x)), 3, stride=2, padding=1)
        for name in self.layers:
            x = getattr(self, name)(x)
        logits: Tensor = self.fc(F.avg_pool2d(x, x.shape[2:]).flatten(1))
        return logits


@register_model("imagenet", "resnet18_react", input_quantizer=RSign(), activation="rprelu")
def resnet18_react(num_classes: int, precision: Precision) -> ReActResNet:
    """ReActNet's ResNet-18: learned thresholds, RPReLU. [Liu et al. 2020, ReActNet, arXiv 2003.03488]"""
    return ReActResNet((2, 2, 2, 2), num_classes, precision)
