"""The packed convolution as an operator of torch: it can be exported, compiled and moved like any other."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from biper.nn.functional import binary_sign
from biper.packed import runtime as kernels
from biper.packed.bits import bits_shape, output_size, unpack_bits
from biper.packed.program import After, Compiled, Geometry, Program, Value

CHANNELS_LAST = torch.channels_last


def _layout(x: Tensor) -> torch.memory_format:
    """Of the output: that of the input, as torch's own convolutions have it."""
    last = x.is_contiguous(memory_format=CHANNELS_LAST) and not x.is_contiguous()
    return CHANNELS_LAST if last else torch.contiguous_format


@torch.library.custom_op("biper::binary_conv2d", mutates_args=())
def binary_conv2d(
    x: Tensor,
    bits: Tensor,
    alpha: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    groups: int,
    binary_activations: bool,
) -> Tensor:
    """conv2d(sign(x), the weights -1 and +1 of `bits`) * alpha; without the sign unless binary_activations.

    x: (N, C_in, H, W); bits: see bits.py; alpha: (C_out, 1, 1). Gives (N, C_out, H', W'). No gradient.
    This is how every device computes it; on the CPU there are kernels for it.
    """
    (height, width), out_channels = kernel, len(alpha)
    w = unpack_bits(bits, out_channels, x.shape[1] // groups, (height, width), groups, x.dtype)
    sums = F.conv2d(binary_sign(x) if binary_activations else x, w, None, stride, padding, groups=groups)
    return (sums * alpha.to(x.dtype)).contiguous(memory_format=_layout(x))


@binary_conv2d.register_fake
def _(
    x: Tensor,
    bits: Tensor,
    alpha: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    groups: int,
    binary_activations: bool,
) -> Tensor:
    sides = (output_size(k, s, p, n) for k, s, p, n in zip(kernel, stride, padding, x.shape[2:], strict=True))
    return torch.empty((x.shape[0], len(alpha), *sides), dtype=x.dtype, device=x.device, memory_format=_layout(x))


@binary_conv2d.register_kernel("cpu")
def _on_the_cpu(
    x: Tensor,
    bits: Tensor,
    alpha: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    groups: int,
    binary_activations: bool,
) -> Tensor:
    path = kernels.chosen()
    if path == kernels.TORCH or not binary_activations or x.dtype != torch.float32 or alpha.dtype != torch.float32:
        plain: Tensor = binary_conv2d._init_fn(x, bits, alpha, kernel, stride, padding, groups, binary_activations)
        return plain
    _, channels, height, width = x.shape
    size, steps, border = ((a, b) for a, b in (kernel, stride, padding))
    geometry = Geometry((channels, height, width), len(alpha), size, steps, border, groups)
    if bits.shape != bits_shape(len(alpha), channels // groups, size, groups):
        raise ValueError(f"bits of shape {tuple(bits.shape)} are not those of {geometry}")
    out = torch.empty((len(x), *geometry.result), dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
    if out.numel():
        dense = x.contiguous(memory_format=CHANNELS_LAST)
        _single(geometry)(path, len(x), dense, bits.contiguous(), alpha.contiguous(), out)
    return out.contiguous(memory_format=_layout(x))


@lru_cache(maxsize=256)
def _single(geometry: Geometry) -> Compiled:
    """The program of one convolution on real activations, with its parameters given."""
    program = Program()
    x, bits, alpha, out = (program.given() for _ in range(4))
    signs = Value(geometry.shape, bits=True)
    program.tail(Value(geometry.shape, outside=x), geometry.shape, After(bits=signs))
    program.conv(signs, geometry, bits, alpha, After(out=Value(geometry.result, outside=out)))
    return Compiled(program)
