"""Weights as the compiled instructions read them: made once of a layer's bits, and kept as long as those."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from biper.packed import runtime
from biper.packed.bits import Border, Pair, words_of_rows
from biper.packed.fields import LANES

T = TypeVar("T")
State = tuple[int, int]


def state_of(bits: Tensor) -> State | None:
    """Another one whenever the tensor gets other values in place; None if torch does not count that.

    It counts what its own operations do, but no writes through `.data` or NumPy.
    """
    return None if bits.is_inference() else (bits.data_ptr(), bits._version)


class Kept(Generic[T]):
    """What is made of bits, as long as those live and hold the same values."""

    def __init__(self) -> None:
        self._made = WeakIdKeyDictionary()

    def of(self, bits: Tensor, make: Callable[[], T]) -> T:
        """What is there, or what `make` gives."""
        state = state_of(bits)
        known: tuple[State | None, T] | None = self._made.get(bits)
        if known is None or state is None or known[0] != state:
            known = self._made[bits] = state, make()
        return known[1]


class Arranged(NamedTuple):
    """weights: words of 32 bits, int32 (blocks, words, 16), row by row, each XORed with all before it, or `nibbles` for
    a path that looks them up; offsets: int32 (2, kinds, blocks, 16). For what packed.c does with them, see there.
    """

    weights: Tensor
    offsets: Tensor


class Arrangement:
    """How the weights of one instruction, a convolution, are arranged.

    border: what is at the border of its images; window: rows of a filter, and bytes of each.
    """

    def __init__(self, instruction: Sequence[int], border: Border, window: Pair) -> None:
        self.instruction, self.border, self.window = instruction, border, window
        self._kept: dict[str, Kept[Arranged]] = defaultdict(Kept)  # by path

    def of(self, bits: Tensor, path: str) -> Arranged:
        """The weights and the offsets of bits (blocks, words, 16) for a path, made anew if those have changed."""
        return self._kept[path].of(bits, lambda: self._arranged(bits, path))

    def _arranged(self, bits: Tensor, path: str) -> Arranged:
        words = weights = _WEIGHTS[self.window].of(bits, lambda: _accumulated(bits, self.window))
        if runtime.looks_up(path):
            weights = _NIBBLES[self.window].of(bits, lambda: nibbles(words))
        return Arranged(weights, runtime.offsets(self.instruction, words, self.border, path))


_WEIGHTS: dict[Pair, Kept[Tensor]] = defaultdict(Kept)  # by window; images of all sizes share them
_NIBBLES: dict[Pair, Kept[Tensor]] = defaultdict(Kept)


def nibbles(words: Tensor) -> Tensor:
    """Accumulated words (blocks, words, 16) as they are looked up: uint8 (blocks, words, byte, half of a byte, 16)."""
    own = words.clone()
    own[:, 1:] ^= words[:, :-1]
    bytes_ = own.unsqueeze(3).view(torch.uint8).transpose(2, 3)  # (blocks, words, byte, 16)
    return torch.stack((bytes_ & 15, bytes_ >> 4), 3)


def _accumulated(bits: Tensor, window: Pair) -> Tensor:
    # cloned: a single word counts as contiguous whatever its strides are, and has none that bytes could be seen by
    in_order = bits.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    in_order = in_order.view(torch.uint8)  # (blocks, 16, bytes)
    rows = in_order[..., : window[0] * window[1]].unflatten(2, window)
    weights: Tensor = words_of_rows(rows).transpose(1, 2).contiguous()
    for word in range(1, weights.shape[1]):
        weights[:, word] ^= weights[:, word - 1]
    return weights


def by_products(weights: Tensor, channels_first: bool) -> Tensor:
    """A real convolution's weights (O, C, H, W) as float32 (blocks, products, 16).

    Products are in the order of their sum, see `SumOrder`: all taps of a channel first, or all channels of a tap.
    """
    rows = weights if channels_first else weights.permute(0, 2, 3, 1)
    whole = F.pad(rows.reshape(len(weights), -1), (0, 0, 0, -len(weights) % LANES))
    ordered: Tensor = whole.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()
    return ordered
