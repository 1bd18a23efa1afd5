"""A soak: python tests/soak.py --minutes 10. What goes on for long must not take more and more memory.

Each command runs for so many minutes, and the memory of all of its processes is read every second: what they have by
themselves, and their shares of what they have in common. The first fifth is left out, in which caches are filled.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from conftest import TINY, photographs
from kills import ROOT, biper, of_session
from tqdm import tqdm

import biper as library

GROWTH = 0.05  # of the memory: more between the second fifth and the last one is too much
PATIENCE = 120  # seconds for a command that is asked to end
LONG = 1_000_000  # epochs: more than there is time for


def memory(leader: int) -> float:
    """MiB of a command and of all processes that it has started, without the files that they map.

    Of those a process counts a share, which changes when others map them too.
    """
    total = 0
    for process in of_session(leader):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total / 1024


def pack_and_run() -> None:
    """Networks made, packed and run on images of other sizes, again and again."""
    chance = random.Random(0)
    while True:
        torch.manual_seed(0)
        network = library.create_model("resnet20_1w1a", family="cifar10", num_classes=10, freq=20.0, stage=2)
        packed = library.pack(network.eval())
        for _ in range(20):
            side = chance.randrange(32, 97)
            packed(torch.zeros(chance.randrange(1, 9), 3, side, side))


def predict_all(folder: Path) -> None:
    """The predictions of a folder of photographs, again and again."""
    from biper.commands.main import main

    file = ROOT / "pretrained_models" / "resnet20_1w1a" / "packed.safetensors"
    while True:
        main(["predict", str(file), str(folder)])


def commands(place: Path) -> Iterator[tuple[str, list[object]]]:
    """By name what goes on for long, with the data it needs in a folder."""
    data = photographs(place / "photographs", train=48, test=8)
    streamed = ["--family", "imagenet", "-a", "resnet18_1w1a", "--dataset", "folder", "--data_path", data]
    streamed += ["--image_size", 32, "-b", 16, "--epochs", LONG, "--freq", 20, "--lr", 0.01, "--workers", 2]
    yield "train, digits in memory", biper("train", *TINY, "-b", 128, "--epochs", LONG, "--results_dir", place / "a")
    yield "train, files streamed by 2 workers", biper("train", *streamed, "--results_dir", place / "b")
    yield "pack, and images of other sizes", [sys.executable, __file__, "--serve", "pack"]
    yield "predict", [sys.executable, __file__, "--serve", data / "val"]


def soaked(name: str, command: list[object], seconds: float) -> list[float]:
    """The memory of a command, second by second. Raises RuntimeError if it ends by itself."""
    given, found, begun = [str(argument) for argument in command], [], time.monotonic()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            given, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )
        try:
            for _ in tqdm(range(round(seconds)), desc=name, unit="s", disable=None):
                time.sleep(max(0.0, begun + len(found) + 1 - time.monotonic()))
                if process.poll() is not None:
                    errors.seek(0)
                    raise RuntimeError(f"{name} ended with {process.returncode}: {errors.read()[-400:]}")
                found.append(memory(process.pid))
            process.send_signal(signal.SIGINT)
            process.wait(PATIENCE)
        finally:
            for left in of_session(process.pid):
                os.kill(left, signal.SIGKILL)
            process.wait()
    return found


def main() -> None:
    """Print the table. Exits with 1 if something has grown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of each command; default 10")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # this is what a soaked process does
    args = parser.parse_args()
    if 60 * args.minutes < 10:
        parser.error("--minutes: ten seconds at least")
    if args.serve:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a process may inherit that it is ignored
        pack_and_run() if args.serve == "pack" else predict_all(Path(args.serve))
        return
    worst = 0.0
    print("| command | seconds | MiB, second fifth | MiB, last fifth | at most |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place:
        for name, command in commands(Path(place)):
            found = soaked(name, command, 60 * args.minutes)
            fifth = max(1, len(found) // 5)
            early, late = (statistics.median(part) for part in (found[fifth : 2 * fifth], found[-fifth:]))
            worst = max(worst, late / early - 1)
            print(f"| {name} | {len(found)} | {early:.0f} | {late:.0f} | {max(found):.0f} |", flush=True)
    sys.exit(worst > GROWTH)


if __name__ == "__main__":
    main()
