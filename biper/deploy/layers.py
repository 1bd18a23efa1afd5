"""The layers of a packed network. They hold what inference needs and cannot be trained."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biper.deploy.bits import bits_shape, output_size, pack_bits, unpack_bits
from biper.deploy.operators import binary_conv2d
from biper.errors import UsageError
from biper.kernels import folded
from biper.layers import BinaryConv2d

Norms = nn.BatchNorm1d | nn.BatchNorm2d


class PackedConv2d(nn.Module):
    """conv2d(sign(a), binary weight) * alpha + bias with weights of one bit: BinaryConv2d of stage 2, for inference.

    Buffers: `bits`, int64 (blocks, words, 16), see bits.py; `alpha` (C_out, 1, 1); `bias` (C_out,), or None. Zero
    padding adds nothing to a sum. On the CPU the sums are XOR and popcount; elsewhere, and without binary activations,
    the bits are unpacked.
    """

    bits: Tensor
    alpha: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d, binary_activations: bool = True) -> None:
        """Of the shape of a convolution, without its weights."""
        super().__init__()
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride = _pair(layer.kernel_size), _pair(layer.stride)
        self.padding, self.dilation = _padding(layer), _pair(layer.dilation)
        self.binary_activations = binary_activations
        shape = bits_shape(self.out_channels, self.in_channels // self.groups, self.kernel_size, self.groups)
        self.register_buffer("bits", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("alpha", torch.ones(self.out_channels, 1, 1))
        self.register_buffer("bias", None if layer.bias is None else torch.zeros(self.out_channels))

    @classmethod
    def like(cls, layer: BinaryConv2d) -> "PackedConv2d":
        """Of a binary layer's shape, without its values."""
        return cls(layer, layer.binary_activations)

    @classmethod
    @torch.no_grad()
    def of(cls, layer: BinaryConv2d) -> "PackedConv2d":
        """A layer of stage 2, packed. Raises UsageError for one of stage 1, whose weights are real."""
        if layer.stage != 2:
            raise UsageError(f"a network of stage {layer.stage} has real weights: train stage 2, then pack that one")
        packed = cls.like(layer)
        packed.bits = pack_bits(layer.effective_weight(), layer.groups)
        packed.alpha = layer.alpha.detach().clone()
        if layer.bias is not None:
            packed.bias = layer.bias.detach().clone()
        return packed

    def binary_weight(self) -> Tensor:
        """The weights -1 and +1, (C_out, C_in/groups, k, k)."""
        channels = self.in_channels // self.groups
        dtype = self.alpha.dtype
        return unpack_bits(self.bits, self.out_channels, channels, self.kernel_size, self.groups, dtype)

    def forward(self, a: Tensor) -> Tensor:
        """a: (N, C_in, H, W) -> (N, C_out, H', W')."""
        self.output_sides(a.shape)
        shape = list(self.kernel_size), list(self.stride), list(self.padding)
        how = self.groups, self.binary_activations, self.bias, list(self.dilation)
        out: Tensor = binary_conv2d(a, self.bits, self.alpha, *shape, *how)
        return out

    def output_sides(self, shape: Sequence[int]) -> list[int]:
        """Height and width of the output for an input (N, C_in, H, W). Raises ValueError if it is none."""
        if len(shape) != 4 or shape[1] != self.in_channels:
            raise ValueError(f"expected (N, {self.in_channels}, H, W), got {tuple(shape)}")
        geometry = zip(self.kernel_size, self.stride, self.padding, self.dilation, shape[2:], strict=True)
        sides = [output_size(*axis) for axis in geometry]
        if min(sides) < 1:
            raise ValueError(f"an image of {tuple(shape[2:])} is smaller than the kernel {self.kernel_size}")
        return sides

    def extra_repr(self) -> str:
        """What print(model) shows."""
        shape = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        more = f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        return f"{shape}, {more}, binary_activations={self.binary_activations}"


class FoldedNorm(nn.Module):
    """A batch norm in evaluation, x * gain + shift, rounded as torch's own is. Buffers gain and shift (C,).

    alpha of the convolution before it is not folded in too: the product would be rounded in another place, and one
    activation in millions would get the other sign.
    """

    gain: Tensor
    shift: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(features))
        self.register_buffer("shift", torch.zeros(features))

    @classmethod
    def like(cls, norm: Norms) -> "FoldedNorm":
        """Of a batch norm's shape, without its values."""
        return cls(norm.num_features)

    @classmethod
    @torch.no_grad()
    def of(cls, norm: Norms) -> "FoldedNorm":
        """The running statistics and the parameters of a batch norm, folded as torch folds them at every call."""
        result = cls.like(norm)
        result.gain, result.shift = folded(norm)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, ...), and so is what comes out."""
        mean, variance = torch.zeros_like(self.shift), torch.ones_like(self.gain)
        return F.batch_norm(x, mean, variance, self.gain, self.shift, False, 0.0, 0.0)


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    height, width = value
    return height, width


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    """In pixels, on both sides alike."""
    if layer.padding_mode != "zeros":
        raise UsageError(f"only zero padding can be packed, not padding_mode={layer.padding_mode!r}")
    if not isinstance(layer.padding, str):
        return _pair(layer.padding)
    if layer.padding == "valid":
        return 0, 0
    both = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]  # 'same', of stride 1 in torch
    if any(pixels % 2 for pixels in both):
        raise UsageError(f"padding='same' of a kernel {layer.kernel_size} is wider on one side: it cannot be packed")
    return _pair(tuple(pixels // 2 for pixels in both))
