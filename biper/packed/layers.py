"""The layers of a packed network. They hold what inference needs and cannot be trained."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biper.errors import UsageError
from biper.nn.layers import BinaryConv2d, BinaryLayer, BinaryLinear
from biper.nn.norms import Norm, fold_norm
from biper.packed.bits import bits_shape, output_size, pack_bits, unpack_bits
from biper.packed.operator import binary_conv2d
from biper.packed.runtime import EPSILON


class PackedConv2d(nn.Module):
    """conv2d(sign(a), binary weight) * alpha + bias with weights of one bit: a BinaryConv2d for inference.

    Buffers: `bits`, int64 (blocks, words, 16), see bits.py; `alpha` (C_out, 1, 1); `bias` (C_out,), or None;
    `threshold` (C_in, 1, 1), from which on a sign is +1, or None, which is 0. Zero padding adds nothing to a sum. On
    the CPU the sums are XOR and popcount; elsewhere, and without binary activations, the bits are unpacked.
    """

    bits: Tensor
    alpha: Tensor
    bias: Tensor | None
    threshold: Tensor | None

    def __init__(self, layer: nn.Conv2d, binary_activations: bool = True, thresholded: bool = False) -> None:
        """Of the shape of a convolution, without its weights."""
        super().__init__()
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride = _pair(layer.kernel_size), _pair(layer.stride)
        self.padding, self.dilation = padding_of(layer), _pair(layer.dilation)
        self.binary_activations = binary_activations
        shape = bits_shape(self.out_channels, self.in_channels // self.groups, self.kernel_size, self.groups)
        self.register_buffer("bits", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("alpha", torch.ones(self.out_channels, 1, 1))
        self.register_buffer("bias", None if layer.bias is None else torch.zeros(self.out_channels))
        self.register_buffer("threshold", torch.zeros(self.in_channels, 1, 1) if thresholded else None)

    @classmethod
    def like(cls, layer: BinaryConv2d) -> "PackedConv2d":
        """Of a binary layer's shape, without its values."""
        return cls(layer, layer.input_quantizer is not None, threshold_of(layer) is not None)

    @classmethod
    @torch.no_grad()
    def of(cls, layer: BinaryConv2d) -> "PackedConv2d":
        """A layer, packed. Raises UsageError for one whose weights are real."""
        packed = cls.like(layer)
        packed.bits = pack_bits(layer.weight_quantizer.signs(layer.weight), layer.groups)
        _take_values(packed, layer)
        return packed

    def binary_weight(self) -> Tensor:
        """The weights -1 and +1, (C_out, C_in/groups, k, k)."""
        channels = self.in_channels // self.groups
        dtype = self.alpha.dtype
        return unpack_bits(self.bits, self.out_channels, channels, self.kernel_size, self.groups, dtype)

    def forward(self, input: Tensor) -> Tensor:  # as torch.nn.Conv2d calls it
        """input: (N, C_in, H, W) -> (N, C_out, H', W')."""
        self.output_sides(input.shape)
        shape = list(self.kernel_size), list(self.stride), list(self.padding)
        how = self.groups, self.binary_activations, self.bias, list(self.dilation), self.threshold
        out: Tensor = binary_conv2d(input, self.bits, self.alpha, *shape, *how)
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
        return f"{shape}, {more}, binary_activations={self.binary_activations}{_threshold_text(self)}"


class PackedLinear(nn.Module):
    """linear(sign(a), binary weight) * alpha + bias with weights of one bit: a BinaryLinear for inference.

    Buffers: `bits`, int64 (blocks, words, 16), see bits.py; `alpha` (out_features,); `bias` likewise, or None;
    `threshold` (in_features,), from which on a sign is +1, or None, which is 0.
    """

    bits: Tensor
    alpha: Tensor
    bias: Tensor | None
    threshold: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        binary_activations: bool = True,
        thresholded: bool = False,
    ) -> None:
        """Without weights."""
        super().__init__()
        self.in_features, self.out_features, self.binary_activations = in_features, out_features, binary_activations
        shape = bits_shape(out_features, in_features, (1, 1), 1)
        self.register_buffer("bits", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("alpha", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_buffer("threshold", torch.zeros(in_features) if thresholded else None)

    @classmethod
    def like(cls, layer: BinaryLinear) -> "PackedLinear":
        """Of a binary layer's shape, without its values."""
        signs = layer.input_quantizer is not None, threshold_of(layer) is not None
        return cls(layer.in_features, layer.out_features, layer.bias is not None, *signs)

    @classmethod
    @torch.no_grad()
    def of(cls, layer: BinaryLinear) -> "PackedLinear":
        """A layer, packed. Raises UsageError for one whose weights are real."""
        packed = cls.like(layer)
        packed.bits = pack_bits(layer.weight_quantizer.signs(layer.weight)[:, :, None, None], 1)
        _take_values(packed, layer)
        return packed

    def binary_weight(self) -> Tensor:
        """The weights -1 and +1, (out_features, in_features)."""
        shape = (self.out_features, self.in_features)
        return unpack_bits(self.bits, *shape, (1, 1), 1, self.alpha.dtype)[:, :, 0, 0]

    def forward(self, input: Tensor) -> Tensor:  # as torch.nn.Linear calls it
        """input: (N, ..., in_features) -> (N, ..., out_features): a convolution of images of one pixel."""
        if input.dim() < 2 or input.shape[-1] != self.in_features:
            raise ValueError(f"expected (N, ..., {self.in_features}), got {tuple(input.shape)}")
        pixels, one = input.reshape(-1, self.in_features)[:, :, None, None], [1, 1]
        alpha, threshold = self.alpha[:, None, None], None if self.threshold is None else self.threshold[:, None, None]
        how = 1, self.binary_activations, self.bias, one, threshold
        out: Tensor = binary_conv2d(pixels, self.bits, alpha, one, one, [0, 0], *how)
        return out.reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, binary_activations={self.binary_activations}{_threshold_text(self)}"


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
    def like(cls, norm: Norm) -> "FoldedNorm":
        """Of a batch norm's shape, without its values."""
        return cls(norm.num_features)

    @classmethod
    @torch.no_grad()
    def of(cls, norm: Norm) -> "FoldedNorm":
        """The running statistics and the parameters of a batch norm, folded as torch folds them at every call."""
        result = cls.like(norm)
        result.gain, result.shift = fold_norm(norm)
        return result

    def forward(self, input: Tensor) -> Tensor:  # as torch.nn.BatchNorm2d calls it
        """input: (N, C, ...), and so is what comes out."""
        mean, variance = torch.zeros_like(self.shift), torch.ones_like(self.gain)
        return F.batch_norm(input, mean, variance, self.gain, self.shift, False, 0.0, EPSILON)


def threshold_of(layer: BinaryLayer) -> Tensor | None:
    """The activations from which on a binary layer's signs are +1; None: from 0 on."""
    return None if layer.input_quantizer is None else layer.input_quantizer.threshold


def _take_values(packed: PackedConv2d | PackedLinear, layer: BinaryLayer) -> None:
    """Give a packed layer what is beside the bits of a binary one."""
    packed.alpha = layer.output_scale().detach().clone()
    if layer.bias is not None:
        packed.bias = layer.bias.detach().clone()
    threshold = threshold_of(layer)
    if packed.threshold is not None and threshold is not None:
        channels = threshold.detach().flatten().expand(len(packed.threshold))  # one for all of them, or for each
        packed.threshold = channels.reshape(packed.threshold.shape).clone(memory_format=torch.contiguous_format)


def _threshold_text(packed: PackedConv2d | PackedLinear) -> str:
    """Nothing without a threshold: files keep what their layers show, and older ones know of none."""
    return "" if packed.threshold is None else ", threshold=True"


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    height, width = value
    return height, width


def padding_of(layer: nn.Conv2d) -> tuple[int, int]:
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
