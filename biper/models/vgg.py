"""VGG-Small: one real and five binary 3x3 convolutions for 32x32 images."""

import math

import torch.nn.functional as F
from torch import Tensor, fx, nn

from biper.errors import UsageError
from biper.models.registry import Network, Precision, register_model

IMAGE_SIZE = 32


@fx.wrap  # so that a tracer, which knows no sizes, leaves it as a whole
def of_our_size(x: Tensor) -> Tensor:
    """The images as they are. Raises UsageError if their size is another than the classifier's."""
    if x.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
        raise UsageError(f"vgg_small takes 32x32 images, not {x.shape[2]}x{x.shape[3]}: use --image_size 32")
    return x


class VGGSmall(Network):
    """conv0 (real) and conv1 to conv5; max-pool after conv1, conv3 and conv5, before their batch norm; fc."""

    def __init__(self, num_classes: int, precision: Precision) -> None:
        super().__init__()
        channels = (128, 128, 256, 256, 512, 512)
        self.conv0 = precision.real_conv(3, channels[0], 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(channels[0])
        self.activation0 = precision.activation(channels[0])
        for i in range(1, 6):
            self.add_module(f"conv{i}", precision.conv(channels[i - 1], channels[i], 3, padding=1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(channels[i]))
            self.add_module(f"activation{i}", precision.activation(channels[i]))
        self.fc = precision.real_linear(channels[5] * (IMAGE_SIZE // 8) ** 2, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, 32, 32) normalized images -> (N, num_classes) logits. Raises UsageError for another size."""
        x = self.activation0(self.bn0(self.conv0(of_our_size(x))))
        for i in range(1, 6):
            x = getattr(self, f"conv{i}")(x)
            if i % 2 == 1:
                x = F.max_pool2d(x, 2)
            x = getattr(self, f"activation{i}")(getattr(self, f"bn{i}")(x))
        logits: Tensor = self.fc(x.flatten(1))  # (N, 512, 4, 4) -> (N, 8192)
        return logits


@register_model("cifar10", "vgg_small")
def vgg_small(num_classes: int, precision: Precision) -> VGGSmall:
    """VGG-Small, 4.66 M parameters."""
    return VGGSmall(num_classes, precision)
