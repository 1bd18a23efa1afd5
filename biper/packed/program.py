"""Programs for the compiled instructions: what is computed from what, and where in memory it lies meanwhile."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from biper.packed import fields, runtime
from biper.packed.arrange import Arrangement, by_products
from biper.packed.bits import Pair, bits_shape, border, output_size
from biper.packed.fields import COPY, GROUP, TILE, WORD

NOWHERE = -1
LINE = 64  # bytes: alignment
Shape = tuple[int, int, int]  # channels, height, width
Source = Callable[[], Tensor]  # gives a parameter when the program runs
Needed = tuple[int, torch.dtype]  # how many numbers of a parameter are read, and of which type


@dataclass(eq=False)
class Value:
    """An activation of one image: floats (H, W, C), or their signs as bits, ceil(C/8) bytes a pixel."""

    shape: Shape
    bits: bool = False
    slack: int = 0  # bytes around it that may be read
    outside: int | None = None  # the number of the tensor that holds it, if it is not scratch
    first: int = 0
    last: int = 0  # the instructions between which it is alive

    @property
    def size(self) -> int:
        """Bytes of an image's."""
        c, h, w = self.shape
        return h * w * (-(-c // 8) if self.bits else 4 * c)


@dataclass(frozen=True)
class Geometry:
    """A convolution's: channels_last pixels in, out_channels out. pool: a maximum over 2x2 windows follows."""

    shape: Shape
    out_channels: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    pool: bool = False

    @property
    def sums(self) -> Pair:
        """Height and width of the convolution's result."""
        axes = zip(self.kernel, self.stride, self.padding, self.dilation, self.shape[1:], strict=True)
        height, width = (output_size(*axis) for axis in axes)
        return height, width

    @property
    def result(self) -> Shape:
        """The shape behind the pooling."""
        height, width = self.sums
        return (self.out_channels, height // 2, width // 2) if self.pool else (self.out_channels, height, width)


@dataclass(frozen=True)
class SumOrder:
    """In which order a real convolution's products are added up.

    channels_first: all taps of a channel, then the next channel; otherwise all channels of a tap, then the next tap.
    chunk: so many of them by themselves, and then the sums of these chunks; 0: all one after the other.
    """

    channels_first: bool = False
    chunk: int = 0


IN_TURN = SumOrder()


@dataclass(frozen=True)
class Affine:
    """The numbers of a folded batch norm's parameters, gain and shift, (C,) each."""

    gain: int
    shift: int


@dataclass(frozen=True)
class Slopes:
    """The numbers of the parameters of prelu(x - before) + after, (C,) each; before and after go together."""

    slope: int = NOWHERE
    before: int = NOWHERE
    after: int = NOWHERE


@dataclass
class After:
    """What follows an instruction's own work, and what of the result is wanted.

    threshold: the number of a parameter (C,), where bits are 1 from it on and not from 0 on.
    """

    norm: Affine | None = None
    skip: Value | None = None
    clamp: bool = False  # the activation is hardtanh
    slopes: Slopes | None = None  # or this one
    out: Value | None = None
    bits: Value | None = None
    threshold: int = NOWHERE

    @property
    def bits_alone(self) -> bool:
        """Whether a convolution's bits are all that is wanted, and follow from its sum alone, by monotone steps."""
        return self.bits is not None and self.out is None and self.skip is None and self.slopes is None


@dataclass(frozen=True)
class Derived:
    """The numbers of a convolution's tensors that are made of others: weights and offsets of the bits.

    parameters: alpha, bias, gain, shift and threshold, where limits take the place of the offsets, and turns are made.
    """

    bits: int
    weights: int
    offsets: int
    arrangement: Arrangement
    turns: int = NOWHERE
    parameters: tuple[int, ...] = ()


@dataclass(frozen=True)
class RealWeights:
    """The numbers of a real convolution's weights, and of what is made of them: see `arrange.by_products`."""

    weights: int
    made: int
    out_channels: int
    kernel: Pair
    channels_first: bool


V = TypeVar("V", bound=Value)
Entry = int | Value | None  # of an instruction: a number, or an activation, if there is any


@dataclass(eq=False)
class Program:
    """A list of instructions under construction; `code()` is what the kernel reads."""

    tensors: int = 0  # so many are numbered
    activations: list[int] = field(default_factory=list)  # given with each run
    parameters: dict[int, Source | None] = field(default_factory=dict)  # asked for, or (None) given with each run
    needed: dict[int, Needed] = field(default_factory=dict)  # of the parameters
    tables: dict[int, Tensor] = field(default_factory=dict)  # the program's own
    arranged: list[Derived] = field(default_factory=list)
    ordered: list[RealWeights] = field(default_factory=list)
    rows: list[list[Entry]] = field(default_factory=list)
    gathered: int = LINE  # bytes, of what an instruction sees around some pixels

    def _number(self) -> int:
        self.tensors += 1
        return self.tensors - 1

    def activation(self) -> int:
        """The number of an activation that is given with each run."""
        self.activations.append(self._number())
        return self.activations[-1]

    def parameter(self, source: Source | None = None) -> int:
        """The number of a parameter that is asked for with each run, or given with it."""
        number = self._number()
        self.parameters[number] = source
        return number

    def table(self, values: Tensor) -> int:
        """The number of a tensor that never changes."""
        number = self._number()
        self.tables[number] = values
        return number

    def _add(self, name: str, x: Value, result: Shape, after: After, **own: int) -> None:
        """One instruction, by the names of its own fields; those of all are made of the rest."""
        norm, (channels, height, width) = after.norm or Affine(NOWHERE, NOWHERE), x.shape
        values: dict[str, Entry] = {"in": x, "out": after.out, "out_bits": after.bits, "skip": after.skip}
        affine = {"gain": norm.gain, "shift": norm.shift}
        affine |= {**asdict(after.slopes or Slopes()), "threshold": after.threshold}
        if after.slopes:
            affine |= self._shifts(result[0], after)
        self._require(result[0], *affine.values(), *(own.get(name, NOWHERE) for name in ("alpha", "bias")))
        sides = {"height": height, "width": width, "out_height": result[1], "out_width": result[2]}
        sides |= {"channels": channels, "clamp": int(after.clamp)}
        self.rows.append(fields.instruction(name, values | affine | sides | own))

    def _require(self, length: int, *numbers: int, dtype: torch.dtype = torch.float32) -> None:
        """Those of the numbered tensors that are parameters have to be so long, and of that type."""
        self.needed |= {number: (length, dtype) for number in numbers if number in self.parameters}

    def _shifts(self, channels: int, after: After) -> dict[str, int]:
        """A prelu's shifts and its signs' threshold, zeros if it has none: packed.c has loops for all of them."""
        assert after.slopes is not None
        given = {"before": after.slopes.before, "after": after.slopes.after}
        given |= {"threshold": after.threshold} if after.bits else {}
        zeros = self.table(torch.zeros(channels, dtype=torch.float32, device="cpu"))
        return {name: zeros if number == NOWHERE else number for name, number in given.items()}

    def conv(self, x: Value, geometry: Geometry, bits: int, alpha: int, after: After, bias: int = NOWHERE) -> None:
        """alpha times the binary convolution of the bits x, the maximum over windows if pooled, and what follows.

        bits, alpha, bias: the numbers of the parameters. The bias is added behind the maximum, which gives the same.
        """
        g = geometry
        channels = g.shape[0] // g.groups
        edge = border(channels, g.kernel, g.stride, g.padding, g.dilation, g.shape[1:])
        kinds, words = edge.masks.shape
        pairs = {"kernel": g.kernel, "stride": g.stride, "pad": g.padding, "dilation": g.dilation}
        own = {f"{name}_{axis}": n for name, pair in pairs.items() for axis, n in zip("hw", pair, strict=True)}
        own |= {"out_channels": g.out_channels, "groups": g.groups, "words": words}
        own |= {"pool": int(g.pool), "conv_height": g.sums[0], "kinds": kinds}
        own |= {"masks": self.table(edge.masks), "classes": self.table(edge.classes)}
        self._require(math.prod(bits_shape(g.out_channels, channels, g.kernel, g.groups)), bits, dtype=torch.int64)
        weights, offsets = self._number(), self._number()
        turns = self._number() if after.bits_alone else NOWHERE
        own |= {"weights": weights, "offsets": offsets, "alpha": alpha, "bias": bias, "turns": turns}
        self._add("CONV", x, g.result, after, **own)
        row = [entry if isinstance(entry, int) else NOWHERE for entry in self.rows[-1]]
        arrangement = Arrangement(row, edge, (g.kernel[0], g.kernel[1] * -(-channels // 8)))
        norm = after.norm or Affine(NOWHERE, NOWHERE)
        limiting = (alpha, bias, norm.gain, norm.shift, after.threshold) if after.bits_alone else ()
        self.arranged.append(Derived(bits, weights, offsets, arrangement, turns, limiting))
        x.slack = max(x.slack, g.padding[1] * -(-g.shape[0] // 8) + COPY)
        self.gathered = max(self.gathered, _gathered(g, words))

    def real(self, x: Value, geometry: Geometry, weights: int, order: SumOrder, after: After) -> None:
        """A convolution of the floats x, without bias, groups and dilation, and what follows.

        weights: the number of the parameter.
        """
        g = geometry
        products = g.shape[0] * g.kernel[0] * g.kernel[1]
        pairs = {"kernel": g.kernel, "stride": g.stride, "pad": g.padding}
        own = {f"{name}_{axis}": n for name, pair in pairs.items() for axis, n in zip("hw", pair, strict=True)}
        self.ordered.append(RealWeights(weights, self._number(), g.out_channels, g.kernel, order.channels_first))
        own |= {"weights": self.ordered[-1].made, "out_channels": g.out_channels}
        own |= {"channels_first": int(order.channels_first), "chunk": order.chunk or products}
        self._require(g.out_channels * products, weights)
        self._add("REAL", x, g.result, after, **own)
        height, width = (side + 2 * pad for side, pad in zip(g.shape[1:], g.padding, strict=True))
        # an int32 for each product, where its activation lies, and the whole padded image: pages that a thread's share
        # does not read are never touched
        self.gathered = max(self.gathered, aligned(4 * (products + g.shape[0] * height * width)))

    def tail(self, x: Value, result: Shape, after: After, window: tuple[int, int, int] = (1, 1, 0)) -> None:
        """What follows, for floats x, and the maximum over windows (size, stride, padding) of it."""
        kernel, stride, pad = window
        self._add("TAIL", x, result, after, kernel=kernel, stride=stride, pad=pad)

    def average(self, x: Value, out: Value, window: int, front: int, copies: int) -> None:
        """The mean over square windows, those at the end cut off; `front` channels of zeros come first."""
        own = {"window": window, "front": front, "copies": copies, "out_channels": out.shape[0]}
        self._add("AVERAGE", x, out.shape, After(out=out), **own)

    def code(self) -> Tensor:
        """The program as int64: see packed/packed.c."""
        values = list(dict.fromkeys(item for row in self.rows for item in row if isinstance(item, Value)))
        for number, row in enumerate(self.rows):
            for item in row:
                if isinstance(item, Value):
                    item.first = min(item.first, number) if item.last else number
                    item.last = number + 1
        offsets, scratch = placed([v for v in values if v.outside is None])
        table = [n for v in values for n in ((NOWHERE, offsets[v]) if v.outside is None else (v.outside, v.size))]
        numbers = {v: i for i, v in enumerate(values)}
        rows = [[NOWHERE if i is None else numbers[i] if isinstance(i, Value) else i for i in row] for row in self.rows]
        flat = [n for row in rows for n in row + [0] * (fields.WIDTH - len(row))]
        facts = {"instructions": len(rows), "values": len(values), "scratch": scratch}
        header = fields.header({**facts, "gathered": self.gathered})
        return torch.tensor(header + table + flat, dtype=torch.int64, device="cpu")


def _gathered(geometry: Geometry, words: int) -> int:
    """Bytes of what a convolution sees around some tiles of pixels, and of its padded image, summed up by rows.

    Twice the bits' own room, for the offsets where those are looked up.
    """
    (channels, *sides), patch = geometry.shape, aligned(2 * WORD // 8 * words + COPY)
    height, width = (side + 2 * pad for side, pad in zip(sides, geometry.padding, strict=True))
    whole = geometry.groups == 1 and geometry.dilation == (1, 1) and channels % WORD == 0
    rows = WORD // 8 * height * (1 + width * channels // WORD) if whole else 0
    return aligned(GROUP * TILE * patch + rows + COPY)


def aligned(size: int) -> int:
    """Bytes rounded up to whole lines."""
    return -(-size // LINE) * LINE


def placed(values: list[V]) -> tuple[dict[V, int], int]:
    """Offsets of the values so that those alive together do not overlap, and the bytes needed in all."""
    offsets: dict[V, int] = {}
    end = LINE
    for value in sorted(values, key=lambda v: v.first):
        space = aligned(value.size + 2 * aligned(value.slack))
        busy = sorted(
            (offsets[v] - aligned(v.slack), offsets[v] + aligned(v.size + aligned(v.slack)))
            for v in offsets
            if v.last > value.first
        )
        start = 0
        for low, high in busy:
            if start + space <= low:
                break
            start = max(start, high)
        offsets[value] = start + aligned(value.slack)
        end = max(end, start + space)
    return offsets, end


@dataclass(frozen=True)
class Ready:
    """Parameters, what was made of them for a path when they were in a state, and where all of it lies.

    addresses: of all numbered tensors, those of the activations still missing.
    """

    path: str
    parameters: Sequence[Tensor]
    state: list[int] | None
    made: Sequence[Tensor]
    addresses: runtime.Addresses


_VERSION = operator.attrgetter("_version")


class Compiled:
    """A program that is ready to run."""

    def __init__(self, program: Program) -> None:
        self.code, self.tensors = program.code(), program.tensors
        self.activations, self.tables = program.activations, program.tables
        self.arranged, self.ordered = program.arranged, program.ordered
        self.parameters = list(program.parameters)
        self.needed = [program.needed[number] for number in self.parameters]
        self.sources = [source for source in program.parameters.values() if source]
        watched = {n for made in program.arranged for n in (made.bits, *made.parameters) if n != NOWHERE}
        watched |= {conv.weights for conv in program.ordered}
        self.watched = [self.parameters.index(number) for number in sorted(watched)]
        self._last: Ready | None = None

    def __call__(self, path: str, images: int, *activations: Tensor, parameters: Sequence[Tensor] = ()) -> None:
        """Run on activations, inputs and outputs, and the parameters to be given, both in the order of their numbers.

        Raises RuntimeError for parameters that are not on the CPU, dense and float32, or of another length.
        """
        _kept, addresses = self.addresses(path, activations, parameters)
        runtime.run(self.code, addresses, images, path)

    def addresses(
        self, path: str, activations: Sequence[Tensor], parameters: Sequence[Tensor] = ()
    ) -> tuple[Ready, runtime.Addresses]:
        """Where all numbered tensors lie, with the arguments and the errors of a call, and what lies there.

        Keep both: another thread may meanwhile replace what this program holds.
        """
        ready = self._prepared(path, parameters, None) if parameters else self._own(path)
        addresses = type(ready.addresses).from_buffer_copy(ready.addresses)
        for number, tensor in zip(self.activations, activations, strict=True):
            addresses[number] = tensor.data_ptr()
        return ready, addresses

    def _own(self, path: str) -> Ready:
        """The network's own parameters: what was made of them last, unless one of them is another one by now."""
        found, last = [source() for source in self.sources], self._last
        state = self._state(found)
        unknown = last is None or state is None or (last.path, last.state) != (path, state)
        if last is None or unknown or any(map(operator.is_not, found, last.parameters)):
            last = self._last = self._prepared(path, found, state)
        return last

    def _state(self, parameters: Sequence[Tensor]) -> list[int] | None:
        """Another one whenever a parameter lies elsewhere, or one that something is made of has other values.

        See `arrange.state_of`.
        """
        watched = [parameters[i] for i in self.watched]
        if any(map(Tensor.is_inference, watched)):
            return None
        return [*map(Tensor.data_ptr, parameters), *map(_VERSION, watched)]

    def _prepared(self, path: str, parameters: Sequence[Tensor], state: list[int] | None) -> Ready:
        for tensor, needed in zip(parameters, self.needed, strict=True):
            _require_readable(tensor, *needed)
        tensors: list[Tensor | None] = [None] * self.tensors
        for number, tensor in [*self.tables.items(), *zip(self.parameters, parameters, strict=True)]:
            tensors[number] = tensor
        made = []
        for real in self.ordered:
            weights = tensors[real.weights]
            assert weights is not None
            filters = weights.detach().view(real.out_channels, -1, *real.kernel)
            made.append(by_products(filters, real.channels_first))
            tensors[real.made] = made[-1]
        for conv in self.arranged:
            bits = tensors[conv.bits]
            assert bits is not None
            weights, offsets = conv.arrangement.of(bits, path)
            if conv.parameters:
                given = [None if number == NOWHERE else tensors[number] for number in conv.parameters]
                offsets, turns = runtime.limits(conv.arrangement.instruction, offsets, given)
                tensors[conv.turns] = turns
                made.append(turns)
            tensors[conv.weights], tensors[conv.offsets] = weights, offsets
            made += [weights, offsets]
        # what was looked at stays in memory: no other values can come to lie at its address meanwhile
        seen = [parameters[i].detach() for i in self.watched]
        return Ready(path, parameters, state, [*made, *seen], runtime.addresses(tensors))


def _require_readable(tensor: Tensor, length: int, dtype: torch.dtype) -> None:
    if tensor.device.type != "cpu" or tensor.dtype != dtype or not tensor.is_contiguous():
        text = f"{tensor.dtype} on {tensor.device}"
        raise RuntimeError(f"a packed network takes float32 images on the CPU, its parameters are {text}")
    if tensor.numel() != length:
        raise RuntimeError(f"a packed network reads {length} numbers of a parameter that has {tensor.numel()}")
