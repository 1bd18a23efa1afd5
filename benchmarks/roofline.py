"""What bounds a packed network: its instructions beside the counts and the copies that a processor manages at most.

python benchmarks/roofline.py -a resnet18_1w1a --plot roofline.png: on one thread, each instruction by itself, with what
it reads in the caches. A multiply-add of signs is one bit whose ones are counted.
"""

import argparse
import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.inference import figure, networks, row, timing_parser
from benchmarks.variants import Case, machine, run
from biper.compilers import find_compiler
from biper.errors import UsageError
from biper.experiments.plots import picture, require_picture
from biper.packed import fields, runtime
from biper.packed.lowering import Segment
from biper.training.process import flush_denormals, keep_memory

SECONDS = 0.05  # that a measurement takes at least
COPIED = {"L2": 1 << 18, "memory": 1 << 26}  # bytes
TERA = 1e12


@dataclass
class Work:
    """What an instruction is, and what it does to an image."""

    name: str
    binary: bool
    multiply_adds: int = 0  # of signs, or of real values
    moved: int = 0  # bytes: activations read and written, and weights


def work_of(fields_of: dict[str, int]) -> Work:
    """Of one instruction, given by its fields."""
    f = fields_of
    kind, pixels, results = f["kind"], f["height"] * f["width"], f["out_height"] * f["out_width"]
    channels = f.get("out_channels", f["channels"])
    moved = pixels * (-(-f["channels"] // 8) if kind == "CONV" else 4 * f["channels"])
    moved += results * channels * 4 * sum(f[name] >= 0 for name in ("out", "skip"))
    moved += results * -(-channels // 8) * (f["out_bits"] >= 0)
    if kind in ("TAIL", "AVERAGE"):
        return Work(kind.lower(), False, 0, moved)
    size = f"{f['kernel_h']}x{f['kernel_w']}"
    weights = channels * f["channels"] // f.get("groups", 1) * f["kernel_h"] * f["kernel_w"]
    places = results * (4 if f.get("pool") else 1)
    name = f"{f['channels']} -> {channels}, {size}, stride {f['stride_h']}, on {f['height']}x{f['width']}"
    binary = kind == "CONV"
    moved += weights // 8 if binary else 4 * weights
    return Work(name if binary else f"real, {name}", binary, places * weights, moved)


def instructions(code: Tensor) -> Iterator[tuple[Work, Tensor]]:
    """Of a program: what each is, and a program of it alone."""
    count, values = int(code[0]), int(code[1])
    start = len(fields.HEADER.split()) + 2 * values
    for line in code[start:].view(count, fields.WIDTH):
        kind = list(fields.INSTRUCTIONS)[int(line[0]) - 1]
        names = f"{fields.HEAD} {fields.INSTRUCTIONS[kind]}".split()
        found = dict(zip(names, line[1:].tolist(), strict=False)) | {"kind": kind}
        alone = torch.cat([code[:start], line])
        alone[0] = 1
        yield work_of(found), alone


def seconds(step: Callable[[], object], rounds: int) -> float:
    """Of one step: the median of some rounds of as many steps as take long enough."""
    step()
    begun = time.perf_counter()
    step()
    times = max(1, round(SECONDS / (time.perf_counter() - begun)))
    found = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for _ in range(times):
            step()
        found.append((time.perf_counter() - begun) / times)
    return statistics.median(found)


def counted(rounds: int) -> tuple[float, float]:
    """Bits a second whose ones one thread counts at most, and whose mismatches as packed.c counts them, 0 if unknown.

    Raises UsageError where the first cannot be measured.
    """
    source = Path(__file__).with_name("bounds.c")
    with TemporaryDirectory() as folder:
        library = Path(folder) / "bounds.so"
        subprocess.run([*find_compiler(), "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
        bounds = ctypes.CDLL(str(library))
    found, loops = [], 1 << 18
    for count in (bounds.count, bounds.count_mismatches):
        count.restype, count.argtypes = ctypes.c_int64, [ctypes.c_int64]
        bits = count(1)
        found.append(bits * loops / seconds(partial(count, loops), rounds) if bits else 0.0)
    if not found[0]:
        raise UsageError("the roof is known for x86-64 alone")
    return found[0], found[1]


def copied(size: int, rounds: int) -> float:
    """Bytes a second that one thread reads and writes when it copies so many."""
    source, target = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))
    return 2 * size / seconds(lambda: target.copy_(source), rounds)


@dataclass
class Measured:
    """Instructions of one kind: how many, and what they do and take an image."""

    work: Work  # of all of them
    number: int = 0
    seconds: float = 0.0

    def add(self, work: Work, seconds: float) -> None:
        """One more."""
        self.work.multiply_adds += work.multiply_adds
        self.work.moved += work.moved
        self.number += 1
        self.seconds += seconds

    @property
    def rate(self) -> float:
        """Multiply-adds a second."""
        return self.work.multiply_adds / self.seconds

    @property
    def intensity(self) -> float:
        """Multiply-adds a byte."""
        return self.work.multiply_adds / self.work.moved


def measured(case: Case, rounds: int) -> tuple[list[Measured], float]:
    """A network's instructions by kind, and the seconds an image of all of it, torch's part included."""
    network, images = networks(case)["packed"], case.images()
    calls: list[tuple[Segment, tuple[Tensor, ...], tuple[Tensor, ...]]] = []

    def note(segment: Segment, given: tuple[Tensor, ...], found: Tensor | tuple[Tensor, ...]) -> None:
        calls.append((segment, given, found if isinstance(found, tuple) else (found,)))

    with torch.inference_mode():
        network(images)
        hooks = [
            module.register_forward_hook(note)
            for segmented in network._forwards.values()
            for module in (segmented.owner.modules() if segmented else ())
            if isinstance(module, Segment)
        ]
        network(images)
        for hook in hooks:
            hook.remove()
        whole = seconds(lambda: network(images), rounds)
        kinds: dict[str, Measured] = {}
        for segment, given, found in calls:
            dense = [x.contiguous(memory_format=torch.channels_last) for x in given]
            for work, step in steps(segment, len(given[0]), [*dense, *found]):
                kind = kinds.setdefault(work.name, Measured(Work(work.name, work.binary)))
                kind.add(work, seconds(step, rounds) / len(given[0]))
    return list(kinds.values()), whole / len(images)


def steps(segment: Segment, images: int, activations: list[Tensor]) -> Iterator[tuple[Work, Callable[[], None]]]:
    """A segment's instructions, each to be run by itself."""
    _kept, addresses = segment.compiled.addresses(runtime.chosen(), activations)
    for work, alone in instructions(segment.compiled.code):
        yield work, partial(runtime.run, alone, addresses, images, runtime.chosen())


def table(kinds: list[Measured], roof: float, whole: float) -> Iterator[str]:
    """A line for every kind of instruction, and one for the rest."""
    yield row("instruction", "number", "µs an image", "share", "T/s", "of the counts", "multiply-adds a byte")
    yield row(*["---"] * 7)
    for kind in kinds:
        cells = kind.work.name, kind.number, figure(1e6 * kind.seconds), f"{kind.seconds / whole:.0%}"
        near = f"{kind.rate / roof:.0%}" if kind.work.binary else ""
        works = (figure(kind.rate / TERA), near, figure(kind.intensity)) if kind.rate else ("", "", "")
        yield row(*cells, *works)
    rest = max(0.0, whole - sum(kind.seconds for kind in kinds))
    yield row("what is around them", "", f"{1e6 * rest:.3g}", f"{rest / whole:.0%}", "", "", "")
    yield row("all", "", figure(1e6 * whole), "100%", "", "", "")


def draw(path: Path, title: str, kinds: list[Measured], roofs: tuple[float, float], slopes: dict[str, float]) -> None:
    """The binary convolutions under their roofs: what is counted, and the same with all that goes with it."""
    roof, mismatches = roofs
    binary = [kind for kind in kinds if kind.work.binary]
    if not binary:
        raise UsageError(f"{title}: no binary convolution to draw")
    with picture(path, 1, 1, 8, 5) as (_, axes):
        plot = axes[0, 0]
        span = [min(kind.intensity for kind in binary) / 4, max(kind.intensity for kind in binary) * 4]
        plot.plot(span, [roof / TERA] * 2, "k-", label=f"nothing but counts: {figure(roof / TERA)} T/s")
        if mismatches:
            label = f"XORs, carries, counts and sums: {figure(mismatches / TERA)} T/s"
            plot.plot(span, [mismatches / TERA] * 2, "k-.", label=label)
        for (name, slope), style in zip(slopes.items(), (":", "--"), strict=True):
            label = f"nothing but copies in {name}: {slope / 1e9:.0f} GB/s"
            plot.plot(span, [x * slope / TERA for x in span], f"k{style}", label=label)
        for kind in binary:
            plot.plot(kind.intensity, kind.rate / TERA, "o", markersize=7, label=kind.work.name)
        plot.set(xscale="log", yscale="log", xlabel="multiply-adds a byte", ylabel="multiply-adds a second (T/s)")
        plot.set(title=title, xlim=span, ylim=(0.05, 2 * roof / TERA))
        plot.grid(alpha=0.3, which="both")
        plot.legend(fontsize=7, loc="lower right")


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = timing_parser(__doc__)
    parser.set_defaults(batches=[64], threads=[1])
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the binary convolutions of the first batch")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = arguments()
    if args.threads != [1]:
        raise UsageError("a roof is that of one thread: --threads 1")
    if args.plot:
        require_picture(args.plot)
    if runtime.chosen() == runtime.TORCH:
        raise UsageError("the compiled instructions are missing here: install a C compiler, then biper again")
    torch.set_num_threads(1)
    flush_denormals()
    keep_memory()
    roof, mismatches = counted(args.rounds)
    slopes = {name: copied(size, args.rounds) for name, size in COPIED.items()}
    copies = ", ".join(f"{slope / 1e9:.0f} GB/s in {name}" for name, slope in slopes.items())
    print(machine())
    limits = [f"nothing but counts: {figure(roof / TERA)} T/s of bits", f"nothing but copies: {copies}"]
    if mismatches:
        limits.insert(1, f"XORs, carries, counts and sums, in registers: {figure(mismatches / TERA)} T/s")
    print(f"{runtime.chosen()}; {'; '.join(limits)}")
    for batch in args.batches:
        kinds, whole = measured(Case(args.model, args.family, 2, batch, torch.device("cpu")), args.rounds)
        print(f"\n## {args.model}, batch {batch}, one thread\n", *table(kinds, roof, whole), sep="\n")
        if args.plot and batch == args.batches[0]:
            draw(args.plot, f"{args.model}, batch {batch}, one thread", kinds, (roof, mismatches), slopes)


if __name__ == "__main__":
    run(main)
