"""MobileNetV1 for images of any size: BiPer's, with binary group convolutions for depth-wise ones, and ReActNet's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biper.models.blocks import without_weight_decay
from biper.models.registry import Network, Precision, register_model
from biper.nn.comparison_quantizers import RSign

GROUP = 16  # input channels that a 3x3 filter sees; depth-wise ones would leave a binary sum of nine terms
# (output channels, stride) of the blocks: MobileNetV1's widths
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


class Stem(nn.Sequential):
    """Real 3x3/2 convolution and batch norm, then the network's activation unless ReActNet has none there.

    (N, 3, H, W) -> (N, C, H/2, W/2), rounded up.
    """

    def __init__(self, channels: int, precision: Precision, activated: bool) -> None:
        convolution = precision.real_conv(3, channels, 3, stride=2, padding=1, bias=False)
        super().__init__(without_weight_decay(convolution), nn.BatchNorm2d(channels))
        if activated:
            self.append(precision.activation(channels))


class MobileBlock(nn.Module):
    """3x3 in groups of 16 channels with a skip, 1x1 to the new width without one, 1x1 with a skip."""

    def __init__(self, in_channels: int, channels: int, stride: int, precision: Precision) -> None:
        super().__init__()
        self.conv1 = precision.conv(in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels // GROUP)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.activation1 = precision.activation(in_channels)
        self.conv2 = precision.conv(in_channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.activation2 = precision.activation(channels)
        self.conv3 = precision.conv(channels, channels, 1)
        self.bn3 = nn.BatchNorm2d(channels)
        self.activation3 = precision.activation(channels)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C_in, H, W) -> (N, C_out, H/stride, W/stride), rounded up."""
        skip = x
        if self.stride != 1:
            skip = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        out = self.activation1(self.bn1(self.conv1(x)) + skip)
        out = self.activation2(self.bn2(self.conv2(out)))
        result: Tensor = self.activation3(self.bn3(self.conv3(out)) + out)
        return result


class ReActBlock(nn.Module):
    """3x3 with a skip, then 1x1 with a skip, which stands beside itself where the width doubles.

    The published code has two 1x1 convolutions there, whose results stand side by side: one of twice the width here.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, precision: Precision) -> None:
        super().__init__()
        self.conv1 = precision.conv(in_channels, in_channels, 3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.activation1 = precision.activation(in_channels)
        self.conv2 = precision.conv(in_channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.activation2 = precision.activation(channels)
        self.stride, self.copies = stride, channels // in_channels

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C_in, H, W) -> (N, C_out, H/stride, W/stride), rounded up."""
        skip = x if self.stride == 1 else F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        out = self.activation1(self.bn1(self.conv1(x)) + skip)
        wide = out if self.copies == 1 else torch.cat([out] * self.copies, 1)
        result: Tensor = self.activation2(self.bn2(self.conv2(out)) + wide)
        return result


@register_model("imagenet", "mobilenet_react", input_quantizer=RSign(), activation="rprelu")
def mobilenet_react(num_classes: int, precision: Precision) -> "MobileNet":
    """ReActNet-A: MobileNet with whole 3x3 convolutions. [Liu et al. 2020, ReActNet, arXiv 2003.03488, section 4.1]"""
    return MobileNet(num_classes, precision, ReActBlock)


@register_model("imagenet", "mobilenet")
class MobileNet(Network):
    """Stem, thirteen blocks, average pool, linear; 8.8 M parameters at 1,000 classes."""

    def __init__(
        self, num_classes: int, precision: Precision, block: type[MobileBlock | ReActBlock] = MobileBlock
    ) -> None:
        super().__init__()
        channels = 32
        stem = Stem(channels, precision, activated=block is MobileBlock)
        self.model = nn.Sequential(stem)  # published names: model.0 is the stem
        for width, stride in BLOCKS:
            self.model.append(block(channels, width, stride, precision))
            channels = width
        self.fc = precision.real_linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) normalized images -> (N, num_classes) logits."""
        x = F.adaptive_avg_pool2d(self.model(x), 1).flatten(1)  # (N, C, H, W) -> (N, C)
        logits: Tensor = self.fc(x)
        return logits
