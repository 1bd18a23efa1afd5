"""What a packed network takes as C on small processors: flash, RAM, instructions for an image, whether bits agree.

python benchmarks/edge.py FILE [--images 100]: a packed network of 32x32 images, on every target of targets.py whose
compiler and emulator are installed; images are random ones. Accuracy is what `biper export FILE --c DIR` says.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.targets import TARGETS, Target
from biper.packed.c.export import KINDS, export_c, name_of
from biper.packed.c.native import NativeNetwork
from biper.packed.c.plan import Plan
from biper.packed.file import load_packed
from biper.packed.network import PackedNetwork

STRICT = ("-std=c99", "-ffp-contract=off", "-fno-strict-aliasing")
ICOUNT = ("-icount", "shift=0")
ROUNDS = 60
COUNTS = Path(__file__).with_name("instructions.c")


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--images", type=int, default=100)
    given = parser.parse_args()
    packed = load_packed(given.file)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (given.images, 32, 32, 3), dtype=torch.uint8, generator=generator)
    with tempfile.TemporaryDirectory() as place:
        made = {skips: written(packed, pixels, skips, Path(place) / skips) for skips in KINDS}
        print("| target | skips | flash: numbers and code, bytes | arena, bytes | instructions an image |")
        print("| --- | --- | --- | --- | --- |")
        for name, target in TARGETS.items():
            for skips in KINDS if not target.reads and installed(target) else ():
                folder = Path(place) / skips
                count, size = instructions(target, packed, made[skips], folder), flash(target, folder)
                print(f"| {name} | {skips} | {size:,} | {made[skips].arena:,} | {count:,} |", flush=True)
        agreement(packed, pixels, Path(place) / "float32")
        speed(packed, made["float32"], Path(place) / "float32", normalized(packed, pixels[:1]))


def speed(packed: PackedNetwork, made: Plan, folder: Path, image: torch.Tensor) -> None:
    """Print the milliseconds of one image on this machine, one thread: the C and the packed network in turn."""
    torch.set_num_threads(1)
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]]
    ways = {"C": NativeNetwork(packed, made, folder), "packed": packed}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, network in ways.items():
                start = time.perf_counter()
                network(image)
                times[name].append(1000 * (time.perf_counter() - start))
    medians = ", ".join(f"{name} {statistics.median(found):.2f} ms" for name, found in times.items())
    print(f"\nOne image, one thread, here, medians of {ROUNDS} rounds in turn: {medians}")


def agreement(packed: PackedNetwork, pixels: torch.Tensor, folder: Path) -> None:
    """Print for each target how many images give the bits of gcc here, and the packed network's class."""
    print(f"\n| target | of {len(pixels)} images: the bits of `gcc -O2` here | the packed network's class |")
    print("| --- | --- | --- |")
    reference, classes = printed(TARGETS["gcc"], folder, pixels), packed(normalized(packed, pixels)).argmax(1)
    for name, target in TARGETS.items():
        if installed(target):
            lines = printed(target, folder, pixels)
            same = sum(map(str.__eq__, reference, lines))
            right = sum(int(line.split()[0]) == label for line, label in zip(lines, classes.tolist(), strict=True))
            print(f"| {name} | {same} | {right} |", flush=True)


def normalized(packed: PackedNetwork, pixels: torch.Tensor) -> torch.Tensor:
    """As the loaders normalize: (N, 3, 32, 32)."""
    m = packed.metadata
    mean, std = (255 * torch.tensor(v) for v in (m.mean, m.std)) if m and m.mean else (torch.zeros(3), torch.ones(3))
    return ((pixels.float() - mean) / std).permute(0, 3, 1, 2).contiguous()


def written(packed: PackedNetwork, pixels: torch.Tensor, skips: str, folder: Path) -> Plan:
    """The C, with the images to compile in."""
    made = export_c(packed, folder, skips=skips, calibration=[normalized(packed, pixels)])
    rows = ",\n".join("{" + ",".join(map(str, image.flatten().tolist())) + "}" for image in pixels)
    count = f"{name_of(packed).upper()}_PIXELS"
    (folder / "images.h").write_text(f"static const uint8_t images[][{count}] = {{\n{rows}}};\n")
    return made


def installed(target: Target) -> bool:
    """Whether its compiler and its emulator are there."""
    return all(shutil.which(tool) for tool in (target.compile[0], *target.run[:1]))


def built(target: Target, folder: Path, main: Path, *flags: str) -> Path:
    """The program."""
    program = folder / "program"
    sources = [str(main), str(folder / "network.c"), str(folder / "kernels.c")]
    subprocess.run([*target.compile, *STRICT, *flags, f"-I{folder}", *sources, "-o", str(program)], check=True)
    return program


def printed(target: Target, folder: Path, pixels: torch.Tensor) -> list[str]:
    """The lines that main.c prints."""
    program = built(target, folder, folder / "main.c", *([] if target.reads else ['-DIMAGES="images.h"']))
    data = pixels.numpy().tobytes() if target.reads else None
    done = subprocess.run([*target.run, str(program)], input=data, capture_output=True, check=True)
    return (done.stdout + (b"" if target.reads else done.stderr)).decode().splitlines()


def instructions(target: Target, packed: PackedNetwork, made: Plan, folder: Path) -> int:
    """Of one image."""
    facts = {"RUN": f"{name_of(packed)}_run_pixels", "ARENA": made.arena, "CLASSES": made.logits.shape[0]}
    program = built(target, folder, COUNTS, *(f"-D{name}={value}" for name, value in facts.items()))
    command = [target.run[0], *ICOUNT, *target.run[1:], str(program)]
    done = subprocess.run(command, capture_output=True, check=True)
    return int(done.stdout + done.stderr)


def flash(target: Target, folder: Path) -> int:
    """Bytes of the network's numbers, the calls and the kernels."""
    total = 0
    flags = [flag for flag in target.compile[1:] if flag.startswith(("-m", "-O", "--specs"))]
    for name in ("network.c", "kernels.c"):
        command = [target.compile[0], *STRICT, *flags, "-c", str(folder / name), "-o", str(folder / "object.o")]
        subprocess.run(command, check=True)
        sizes = subprocess.check_output([target.compile[0].replace("gcc", "size"), str(folder / "object.o")])
        total += int(sizes.split()[6])
    return total


if __name__ == "__main__":
    main()
