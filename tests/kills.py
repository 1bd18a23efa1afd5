"""A campaign of kills: python tests/kills.py --kills 500 --seed 0.

Commands are killed (-9, the first process alone) at random moments and started again until they end. What they leave
must be, bit for bit, what an uninterrupted run leaves, and no process of theirs may live on.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from archives import imagenet_archives
from conftest import TINY, photographs
from recipes import RECIPE
from tqdm import tqdm

from biper.models.checkpoint import read_checkpoint
from biper.training.checkpoint import BEST

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 10  # seconds after which no process may be left
OF_TIME = ("seconds", "settings", "versions")  # of a checkpoint: what differs between equal runs
PREPARE = """
import hashlib, sys
from pathlib import Path
from torchvision.datasets import imagenet
from biper.commands.prepare import main
for name, (file, _) in imagenet.ARCHIVE_META.items():
    imagenet.ARCHIVE_META[name] = file, hashlib.md5((Path(sys.argv[1]) / file).read_bytes()).hexdigest()
main(["--archives", sys.argv[1], "--data_path", sys.argv[2]])
"""  # torchvision knows the sums of the real archives, of 144 GB


@dataclass(frozen=True)
class Scenario:
    """A command that goes on where it was killed; command(folder) leaves there what is compared."""

    name: str
    command: Callable[[Path], list[object]]
    equal: Callable[[Path, Path], bool]


@dataclass
class Count:
    """What happened to a scenario."""

    kills: int = 0
    ended: int = 0
    differ: list[str] = field(default_factory=list)
    alive: int = 0


def biper(*arguments: object) -> list[object]:
    """A command of the program."""
    return [sys.executable, "-m", "biper", *arguments]


def same(a: object, b: object) -> bool:
    """Whether two values of checkpoints are equal to the last bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_runs(a: Path, b: Path) -> bool:
    """Whether all checkpoints and metrics below two folders are equal."""
    names = sorted(path.relative_to(a) for path in a.rglob("*") if path.name == "metrics.csv" or ".pth" in path.name)
    for name in names:
        if not (b / name).exists():
            return False
        if name.suffix == ".csv":
            if (a / name).read_bytes() != (b / name).read_bytes():
                return False
            continue
        one, two = ({k: v for k, v in read_checkpoint(f / name).items() if k not in OF_TIME} for f in (a, b))
        if not same(one, two):
            return False
    return bool(names)


def same_files(a: Path, b: Path) -> bool:
    """Whether two folders have the same files, hidden ones and folders of torch's own apart, with the same bytes."""
    found = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (a, b)]
    return found[0] == found[1] and bool(found[0])


def scenarios(place: Path) -> Iterator[Scenario]:
    """Every one, with what it needs in a folder."""
    data, archives = photographs(place / "photographs", train=24, test=4), imagenet_archives(place)
    (place / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    often = ["--checkpoint_minutes", "0.01", "--resume", "--results_dir"]
    tiny = [*TINY, "-b", 128, "--epochs", 6, *often]
    streamed = ["--family", "imagenet", "-a", "resnet18_1w1a", "--dataset", "folder", "--data_path", data]
    streamed += ["--image_size", 32, "-b", 8, "--epochs", 2, "--freq", 20, "--lr", 0.01, "--workers", 2, *often]
    first, last = place / "first", place / "last"
    second = ["--stage", 2, "--load_ckpt_stage1", first / BEST, "--lr", 0.01, "-b", 128, "--epochs", 6, *often]
    for command in (biper("train", *tiny, first), biper("train", *second, last)):
        subprocess.run([str(argument) for argument in command], check=True, capture_output=True)
    yield Scenario("stage 1", lambda f: biper("train", *tiny, f), same_runs)
    yield Scenario("stage 2", lambda f: biper("train", *second, f), same_runs)
    yield Scenario("streamed, 2 workers", lambda f: biper("train", *streamed, f), same_runs)
    yield Scenario("export", lambda f: biper("export", last / BEST, "-o", f / "packed.safetensors"), same_files)
    prepare = [sys.executable, "-c", PREPARE, archives]
    yield Scenario("prepare", lambda f: [*prepare, f], same_files)
    reproduce = ["reproduce", place / "tiny.yaml", "--seeds", 0, "--results_dir"]
    yield Scenario("reproduce", lambda f: biper(*reproduce, f), same_runs)


def of_session(leader: int) -> list[int]:
    """The processes that a command has started, itself included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *numbers = path.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has just ended
            continue
        if int(numbers[2]) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def run(scenario: Scenario, folder: Path, moment: float | None, count: Count) -> bool:
    """Run a command, and kill it after `moment` seconds. Whether it ended before."""
    folder.mkdir(exist_ok=True)
    command = [str(argument) for argument in scenario.command(folder)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        _, said = process.communicate(timeout=moment)
        if process.returncode:
            raise RuntimeError(f"{scenario.name} ended with {process.returncode}: {said.decode()[-400:]}")
        return True
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.stderr.close() if process.stderr else None
        process.wait()
        count.kills += 1
    until = time.monotonic() + PATIENCE
    while (left := of_session(process.pid)) and time.monotonic() < until:
        time.sleep(0.1)
    count.alive += len(left)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return False


def campaign(place: Path, kills: int, seed: int, only: list[str]) -> dict[str, Count]:
    """Each scenario in turn, or those that are named, until there were that many kills in all."""
    chance, counts = random.Random(seed), {}
    known = [scenario for scenario in scenarios(place) if scenario.name in only or not only]
    for number, scenario in enumerate(known):
        count = counts[scenario.name] = Count()
        start, whole = time.monotonic(), place / f"{number}_whole"
        run(scenario, whole, None, count)
        length, share = time.monotonic() - start, kills * (number + 1) // len(known) - kills * number // len(known)
        cut = place / f"{number}_cut"
        with tqdm(total=share, desc=scenario.name, disable=None) as bar:
            while count.kills < share or cut.exists():
                last = count.kills >= share
                if run(scenario, cut, None if last else chance.uniform(0.3, length), count):
                    count.ended += 1
                    if not scenario.equal(whole, cut):
                        count.differ.append(f"after {count.kills} kills")
                    shutil.rmtree(cut)
                bar.update(count.kills - bar.n)
    return counts


def main() -> None:
    """Print the table. Exits with 1 if something was lost or lived on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=500, help="default 500, over all scenarios")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default 0")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="commands, as in the table; default all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        counts = campaign(Path(place), args.kills, args.seed, args.only)
    print("| command | kills | runs that ended | not equal | processes left |\n| --- | --- | --- | --- | --- |")
    for name, c in counts.items():
        print(f"| {name} | {c.kills} | {c.ended} | {len(c.differ)} | {c.alive} |")
    sys.exit(any(c.differ or c.alive for c in counts.values()))


if __name__ == "__main__":
    main()
