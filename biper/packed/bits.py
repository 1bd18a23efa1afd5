"""Weights as bits: how they lie in memory, and which of them meet the image at its border.

A weight is a bit, 1 for +1 and 0 for -1. The bits of an output channel go tap by tap, in rows; within a tap channel by
channel, filled up with zeros to whole bytes; after the last tap to whole words of 64. Sixteen output channels lie side
by side, so that a processor's vector takes them together: words[block][word][channel], the shape of every `bits` below.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WORD, LANES = 64, 16
Pair = tuple[int, int]


def bits_shape(out_channels: int, channels: int, kernel: Pair, groups: int) -> tuple[int, int, int]:
    """The shape of `bits` for out_channels filters over `channels` channels each: (blocks, words, 16)."""
    taps = kernel[0] * kernel[1]
    return groups * -(-(out_channels // groups) // LANES), -(-taps * 8 * -(-channels // 8) // WORD), LANES


def pack_bits(binary: Tensor, groups: int) -> Tensor:
    """Weights (C_out, C_in/groups, k, k), of which those above 0 are ones, as int64 words (blocks, words, 16)."""
    taps = (binary > 0).permute(0, 2, 3, 1)  # (C_out, k, k, C_in/groups)
    flat = F.pad(taps, (0, -taps.shape[-1] % 8)).flatten(1)
    flat = F.pad(flat, (0, -flat.shape[1] % WORD)).unflatten(1, (-1, WORD))
    words = (flat.long() << torch.arange(WORD, device=binary.device)).sum(-1)  # (C_out, words); a sum without carries
    words = words.unflatten(0, (groups, -1))
    words = F.pad(words, (0, 0, 0, -words.shape[1] % LANES))
    blocks: Tensor = words.unflatten(1, (-1, LANES)).flatten(0, 1)  # (blocks, 16, words)
    return blocks.transpose(1, 2).contiguous()


def unpack_bits(
    bits: Tensor, out_channels: int, channels: int, kernel: Pair, groups: int, dtype: torch.dtype
) -> Tensor:
    """The weights -1 and +1 (C_out, C_in/groups, k, k) of `bits`."""
    words = bits.transpose(1, 2).unflatten(0, (groups, -1)).flatten(1, 2)  # (groups, C_out/groups and more, words)
    words = words[:, : out_channels // groups].flatten(0, 1)
    flat = (words[..., None] >> torch.arange(WORD, device=bits.device) & 1).flatten(1)
    taps = kernel[0] * kernel[1]
    flat = flat[:, : taps * 8 * -(-channels // 8)]
    ones: Tensor = flat.unflatten(1, (*kernel, -1))[..., :channels]  # (C_out, k, k, C_in/groups)
    return (2 * ones - 1).to(dtype).permute(0, 3, 1, 2).contiguous()


def words_of_rows(window: Tensor) -> Tensor:
    """Bytes of windows (..., rows, bytes of a row) as the compiled instructions have them, in words of 32 bits.

    Each row is filled up with zeros to whole words: int32 (..., words).
    """
    rows = F.pad(window, (0, -window.shape[-1] % 4)).clone(memory_format=torch.contiguous_format)
    words: Tensor = rows.view(torch.int32).flatten(-2)
    return words


class Border(NamedTuple):
    """Which weights of a filter lie in an image, by kinds of output pixels.

    masks (kinds, words of 32 bits) int32: ones where they do, in rows of whole words; terms (kinds,) int32: how many;
    rows (kinds,) int32: an output row with pixels of the kind; classes (H' + W',) int32: an output pixel's kind is that
    of its row plus that of its column.
    """

    masks: Tensor
    terms: Tensor
    rows: Tensor
    classes: Tensor


@lru_cache(maxsize=256)
def border(channels: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, size: Pair) -> Border:
    """What it is for a filter over `channels` channels and an image of `size`."""
    rows, columns = (_cuts(*axis) for axis in zip(kernel, stride, padding, dilation, size, strict=True))
    row_kinds, column_kinds = sorted(set(rows)), sorted(set(columns))
    shape = len(row_kinds), len(column_kinds), *kernel, channels
    inside = torch.zeros(shape, dtype=torch.int32, device="cpu")
    for i, (top, bottom) in enumerate(row_kinds):
        for j, (left, right) in enumerate(column_kinds):
            inside[i, j, top:bottom, left:right] = 1
    inside = inside.flatten(0, 1)  # (kinds, k, k, channels)
    bits = F.pad(inside, (0, -channels % 8)).unflatten(-1, (-1, 8))
    taps = (bits << torch.arange(8, device="cpu")).sum(-1).to(torch.uint8)  # (kinds, k, k, bytes)
    masks = words_of_rows(taps.flatten(2))
    first = [rows.index(kind) for kind in row_kinds for _ in column_kinds]
    kinds = [row_kinds.index(row) * len(column_kinds) for row in rows] + [column_kinds.index(c) for c in columns]
    terms = inside.flatten(1).sum(1, dtype=torch.int32)
    return Border(masks, terms, *(torch.tensor(n, dtype=torch.int32, device="cpu") for n in (first, kinds)))


def _cuts(kernel: int, stride: int, padding: int, dilation: int, size: int) -> list[Pair]:
    """For every output place along one axis the taps from and to which it sees the image."""
    places = range(output_size(kernel, stride, padding, dilation, size))
    starts = (place * stride - padding for place in places)
    return [(min(_taps(-start, dilation), kernel), min(_taps(size - start, dilation), kernel)) for start in starts]


def _taps(distance: int, dilation: int) -> int:
    """How many taps lie nearer than `distance` to the first one."""
    return max(0, -(-distance // dilation))


def output_size(kernel: int, stride: int, padding: int, dilation: int, size: int) -> int:
    """How many places a convolution has along an axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
