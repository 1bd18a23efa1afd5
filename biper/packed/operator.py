"""The packed convolution as an operator of torch: it can be exported, compiled and moved like any other."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from biper.nn.functional import binary_sign, threshold_sign
from biper.packed import runtime
from biper.packed.bits import bits_shape, output_size, unpack_bits
from biper.packed.program import NOWHERE, After, Compiled, Geometry, Program, Value

CHANNELS_LAST = torch.channels_last
# written down, as torch 2.6 knows no `list[int]` from which it could tell
SCHEMA = (
    "(Tensor x, Tensor bits, Tensor alpha, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt groups, "
    "bool binary_activations, Tensor? bias=None, SymInt[]? dilation=None, Tensor? threshold=None) -> Tensor"
)


def _layout(x: Tensor) -> torch.memory_format:
    """Of the output: that of the input, as torch's own convolutions have it."""
    last = x.is_contiguous(memory_format=CHANNELS_LAST) and not x.is_contiguous()
    return CHANNELS_LAST if last else torch.contiguous_format


@torch.library.custom_op("biper::binary_conv2d", mutates_args=(), schema=SCHEMA)
def binary_conv2d(
    x: Tensor,
    bits: Tensor,
    alpha: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    groups: int,
    binary_activations: bool,
    bias: Tensor | None = None,
    dilation: list[int] | None = None,
    threshold: Tensor | None = None,
) -> Tensor:
    """conv2d(sign(x), the weights -1 and +1 of `bits`) * alpha + bias; without the sign unless binary_activations.

    x: (N, C_in, H, W); bits: see bits.py; alpha: (C_out, 1, 1); bias: (C_out,); threshold: (C_in, 1, 1), from which on
    a sign is +1, 0 if absent. Gives (N, C_out, H', W'). No gradient. No dilation is one of 1: it and the threshold came
    later, and what was exported before does not give them.
    This is how every device computes it; on the CPU there are kernels for it.
    """
    (height, width), out_channels = kernel, len(alpha)
    w = unpack_bits(bits, out_channels, x.shape[1] // groups, (height, width), groups, x.dtype)
    if binary_activations:
        x = binary_sign(x) if threshold is None else threshold_sign(x, threshold)
    sums = F.conv2d(x, w, None, stride, padding, dilation or 1, groups)
    out = sums * alpha.to(x.dtype)
    if bias is not None:
        out = out + bias.to(x.dtype)[:, None, None]
    return out.contiguous(memory_format=_layout(x))


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
    bias: Tensor | None = None,
    dilation: list[int] | None = None,
    threshold: Tensor | None = None,
) -> Tensor:
    axes = zip(kernel, stride, padding, dilation or [1, 1], x.shape[2:], strict=True)
    sides = [output_size(*axis) for axis in axes]
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
    bias: Tensor | None = None,
    dilation: list[int] | None = None,
    threshold: Tensor | None = None,
) -> Tensor:
    path = runtime.chosen()
    scales = [t for t in (alpha, bias, threshold) if t is not None]
    if path == runtime.TORCH or not binary_activations or any(t.dtype != torch.float32 for t in (x, *scales)):
        given = x, bits, alpha, kernel, stride, padding, groups, binary_activations, bias, dilation, threshold
        plain: Tensor = binary_conv2d._init_fn(*given)
        return plain
    _, channels, height, width = x.shape
    size, steps, border, spread = ((a, b) for a, b in (kernel, stride, padding, dilation or [1, 1]))
    geometry = Geometry((channels, height, width), len(alpha), size, steps, border, spread, groups)
    if bits.shape != bits_shape(len(alpha), channels // groups, size, groups):
        raise ValueError(f"bits of shape {tuple(bits.shape)} are not those of {geometry}")
    out = torch.empty((len(x), *geometry.result), dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
    if out.numel():
        dense = x.contiguous(memory_format=CHANNELS_LAST)
        parameters = [tensor.contiguous() for tensor in (bits, *scales)]
        program = _single(geometry, bias is not None, threshold is not None)
        program(path, len(x), dense, out, parameters=parameters)
    return out.contiguous(memory_format=_layout(x))


@lru_cache(maxsize=256)
def _single(geometry: Geometry, biased: bool, thresholded: bool) -> Compiled:
    """The program of one convolution on real activations, with its parameters given, as far as it has them."""
    program = Program()
    x, out = program.activation(), program.activation()
    bits, alpha = program.parameter(), program.parameter()
    bias, threshold = (program.parameter() if there else NOWHERE for there in (biased, thresholded))
    signs = Value(geometry.shape, bits=True)
    program.tail(Value(geometry.shape, outside=x), geometry.shape, After(bits=signs, threshold=threshold))
    program.conv(signs, geometry, bits, alpha, After(out=Value(geometry.result, outside=out)), bias)
    return Compiled(program)
