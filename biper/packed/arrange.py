"""Weights as the compiled instructions read them: made once of a layer's bits, and kept as long as those."""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from biper.packed import runtime
from biper.packed.bits import Border


class Arranged(NamedTuple):
    """What was made of the bits of a layer when they were of a version.

    weights: words of 32 bits, int32 (blocks, words, 16), each XORed with all before it; offsets: int32 (2, kinds,
    blocks, 16). For what packed.c does with them, see there.
    """

    version: int
    weights: Tensor
    offsets: Tensor


class Arrangement:
    """How the weights of one instruction, a convolution, are arranged. border: what is at the border of its images."""

    def __init__(self, instruction: Sequence[int], border: Border) -> None:
        self.instruction, self.border = instruction, border
        self._kept = WeakIdKeyDictionary()  # by the bits
        self._last: tuple[weakref.ref[Tensor], Arranged] | None = None  # quicker to find: small networks wait for it

    def of(self, bits: Tensor) -> Arranged:
        """The weights and the offsets of bits (blocks, words, 16), made anew if values were written into them."""
        version = -1 if bits.is_inference() else bits._version  # torch does not count that of tensors for inference
        last = self._last
        if last is not None and last[0]() is bits and last[1].version == version >= 0:
            return last[1]
        known: Arranged | None = self._kept.get(bits)
        if known is None or known.version != version or version < 0:
            weights = _accumulated(bits, version, len(self.border.masks[0]))
            known = Arranged(version, weights, runtime.offsets(self.instruction, weights, self.border))
            self._kept[bits] = known
        self._last = weakref.ref(bits), known
        return known


_WEIGHTS = WeakIdKeyDictionary()  # by the bits, with their version: images of all sizes share them


def _accumulated(bits: Tensor, version: int, words: int) -> Tensor:
    known = _WEIGHTS.get(bits)
    if known is None or known[0] != version or version < 0:
        halves = bits.view(torch.int32).unflatten(2, (-1, 2))  # (blocks, words, 16, 2)
        weights = halves.transpose(2, 3).flatten(1, 2)[:, :words].contiguous()
        for word in range(1, weights.shape[1]):
            weights[:, word] ^= weights[:, word - 1]
        known = _WEIGHTS[bits] = version, weights
    result: Tensor = known[1]
    return result
