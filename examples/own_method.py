"""A method of two stages, a quantizer of activations that learns, and a network: docs/compare.md is about them."""

import torch
from torch import Tensor, nn

import biper


@biper.register_quantizer("soft")
class Soft(biper.WeightQuantizer):
    """Stage 1: tanh(steepness*w), real weights that lie close to -1 and +1."""

    binary = False

    def __init__(self, steepness: float = 20.0) -> None:
        super().__init__()
        self.steepness = steepness

    def real(self, w: Tensor) -> Tensor:
        """What becomes binary: the quantization error is measured from it."""
        return torch.tanh(self.steepness * w)

    def forward(self, w: Tensor) -> Tensor:
        """w: (C_out, ...)."""
        return self.real(w)

    def binarized(self) -> biper.WeightQuantizer:
        """What takes its place in stage 2."""
        return SoftSign(self.steepness)


@biper.register_quantizer("soft_sign")
class SoftSign(Soft):
    """Stage 2: the sign, with the gradient of stage 1, times the mean magnitude of its channel."""

    binary = True

    def forward(self, w: Tensor) -> Tensor:
        """w: (C_out, ...)."""
        soft = self.real(w)
        return torch.where(w >= 0, 1.0, -1.0).to(w.dtype) + (soft - soft.detach())

    def scale(self, w: Tensor) -> Tensor:
        """(C_out, 1, ...)."""
        return self.real(w).abs().mean(tuple(range(1, w.dim())), keepdim=True)

    def binarized(self) -> biper.WeightQuantizer:
        """It is binary already."""
        return self


@biper.register_quantizer("learned_sign")
class LearnedSign(biper.InputQuantizer):
    """+1 from a threshold on that each channel learns; gradient 1 within a distance of 1."""

    def fit(self, shape: tuple[int, ...]) -> None:
        """Told the shape of a number for each channel."""
        self.threshold = nn.Parameter(torch.zeros(shape))

    def forward(self, a: Tensor) -> Tensor:
        """a: (N, C, H, W)."""
        assert self.threshold is not None  # fit has made it
        clipped = (a - self.threshold).clamp(-1, 1)
        return torch.where(a >= self.threshold, 1.0, -1.0) + (clipped - clipped.detach())


@biper.register_model("cifar10", "small")
class Small(biper.Network):
    """One real and two binary convolutions: small_1w1a, small_1w32a and small_32w32a, of every method."""

    def __init__(self, num_classes: int, precision: biper.Precision) -> None:
        super().__init__()
        self.body = nn.Sequential(precision.real_conv(3, 32, 3, padding=1, bias=False))
        for channels in (32, 64):
            self.body.extend([nn.BatchNorm2d(channels), precision.activation(channels)])
            self.body.append(precision.conv(channels, 64, 3, stride=2, padding=1))
        self.body.extend([nn.BatchNorm2d(64), nn.AdaptiveAvgPool2d(1), nn.Flatten()])
        self.body.append(precision.real_linear(64, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) -> (N, num_classes)."""
        logits: Tensor = self.body(x)
        return logits
