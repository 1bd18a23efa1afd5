"""CIFAR ResNets. The stem, the batch norms and the classifier are real; skips have no parameters."""

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from biper.models.blocks import Block, DoubleSkip
from biper.models.registry import Network, Precision, register_model
from biper.nn.comparison_quantizers import RSign


def match_shape(x: Tensor, missing: int, stride: int) -> Tensor:
    """The skip where the shape changes: average pool, then the missing channels, zero, half in front and half behind.

    (N, C, H, W) -> (N, C + missing, H/stride, W/stride), rounded up as a padded convolution of that stride rounds.
    """
    if stride != 1:
        x = F.avg_pool2d(x, stride, ceil_mode=True)
    return F.pad(x, (0, 0, 0, 0, missing // 2, missing // 2)) if missing else x


class PooledDoubleSkip(DoubleSkip):
    """DoubleSkip whose first skip has no parameters."""

    def __init__(self, in_channels: int, channels: int, stride: int, precision: Precision) -> None:
        super().__init__(in_channels, channels, stride, precision)
        self.skip = partial(match_shape, missing=channels - in_channels, stride=stride)


class SingleSkip(Block):
    """One skip around both convolutions, without parameters."""

    def __init__(self, in_channels: int, channels: int, stride: int, precision: Precision) -> None:
        super().__init__(in_channels, channels, stride, precision)
        self.skip = partial(match_shape, missing=channels - in_channels, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C_in, H, W) -> (N, C_out, H/stride, W/stride)."""
        out = self.activation1(self.bn1(self.conv1(x)))
        result: Tensor = self.activation2(self.bn2(self.conv2(out)) + self.skip(x))
        return result


class CifarResNet(Network):
    """Real 3x3 stem, stages of blocks (stride 2 from the second on), average pool, batch norm, linear."""

    def __init__(
        self,
        block: type[Block],
        blocks: Sequence[int],
        channels: Sequence[int],
        num_classes: int,
        precision: Precision,
    ) -> None:
        super().__init__()
        self.conv1 = precision.real_conv(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        # the published single-skip networks feed the first block without a non-linearity
        self.stem_activation = precision.activation(channels[0]) if block is PooledDoubleSkip else nn.Identity()
        in_channels = channels[0]
        self.layers = [f"layer{i + 1}" for i in range(len(blocks))]
        for i, name in enumerate(self.layers):
            strides = [1 if i == 0 else 2] + [1] * (blocks[i] - 1)
            inputs = [in_channels] + [channels[i]] * (blocks[i] - 1)
            members = (block(c, channels[i], s, precision) for c, s in zip(inputs, strides, strict=True))
            self.add_module(name, nn.Sequential(*members))
            in_channels = channels[i]
        self.bn2 = nn.BatchNorm1d(in_channels)
        self.linear = precision.real_linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) normalized images -> (N, num_classes) logits."""
        x = self.stem_activation(self.bn1(self.conv1(x)))
        for name in self.layers:
            x = getattr(self, name)(x)
        x = F.avg_pool2d(x, x.shape[2:]).flatten(1)  # (N, C, H, W) -> (N, C)
        logits: Tensor = self.linear(self.bn2(x))
        return logits


@register_model("cifar10", "resnet20")
def resnet20(num_classes: int, precision: Precision) -> CifarResNet:
    """ResNet-20 with double skips, 0.27 M parameters."""
    return CifarResNet(PooledDoubleSkip, (3, 3, 3), (16, 32, 64), num_classes, precision)


@register_model("cifar10", "resnet20_react", input_quantizer=RSign(), activation="rprelu")
def resnet20_react(num_classes: int, precision: Precision) -> CifarResNet:
    """ResNet-20 with ReActNet's thresholds and activations. [Liu et al. 2020, ReActNet, arXiv 2003.03488]"""
    return CifarResNet(PooledDoubleSkip, (3, 3, 3), (16, 32, 64), num_classes, precision)


@register_model("cifar10", "resnet18_react", input_quantizer=RSign(), activation="rprelu")
def resnet18_react(num_classes: int, precision: Precision) -> CifarResNet:
    """ResNet-18 with a skip around each convolution, and ReActNet's thresholds and activations. [ReActNet]"""
    return CifarResNet(PooledDoubleSkip, (2, 2, 2, 2), (64, 128, 256, 512), num_classes, precision)


def _register_single_skip(name: str, blocks: Sequence[int], channels: Sequence[int]) -> None:
    @register_model("cifar10", name)
    def build(num_classes: int, precision: Precision) -> CifarResNet:
        return CifarResNet(SingleSkip, blocks, channels, num_classes, precision)


_register_single_skip("resnet18", (2, 2, 2, 2), (64, 128, 256, 512))
_register_single_skip("resnet18A", (2, 2, 2, 2), (32, 32, 64, 128))
_register_single_skip("resnet18B", (2, 2, 2, 2), (32, 64, 128, 256))
_register_single_skip("resnet18C", (2, 2, 2, 2), (64, 64, 128, 256))
_register_single_skip("resnet34", (3, 4, 6, 3), (64, 128, 256, 512))
