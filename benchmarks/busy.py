"""Milliseconds of a packed network on a machine that has other work: beside a process that takes a core, after torch's.

python benchmarks/busy.py -a resnet18_1w1a --threads 2: medians, and how many times those of the quiet machine they are.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import biper
from benchmarks.variants import machine, positive, run

BATCHES = (1, 64)


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-a", "--model", default="resnet18_1w1a", help="of CIFAR; default resnet18_1w1a")
    parser.add_argument("--threads", type=positive, default=2, help="default 2")
    parser.add_argument("--rounds", type=positive, default=5, help="default 5: of each situation, in turn")
    parser.add_argument("--calls", type=positive, default=40, help="in a round; default 40, of batch 64 an eighth")
    parser.add_argument("--nice", type=int, default=10, help="of the process that takes a core; default 10")
    return parser.parse_args()


def _spin(nice: int) -> None:
    os.nice(nice)
    while True:
        pass


@contextmanager
def core_taken(nice: int) -> Iterator[None]:
    """Beside a process that computes without end."""
    process = multiprocessing.get_context("spawn").Process(target=_spin, args=(nice,), daemon=True)
    process.start()
    time.sleep(1.0)  # until it has begun to compute
    try:
        yield
    finally:
        process.kill()
        process.join()


def milliseconds(call: Callable[[], object], calls: int, before: Callable[[], object] = lambda: None) -> list[float]:
    """Of each call, `before` not counted."""
    found = []
    for _ in range(calls):
        before()
        start = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - start))
    return found


@torch.inference_mode()
def measured(packed: torch.nn.Module, batch: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of every call in each situation."""
    images, square = torch.randn(batch, 3, 32, 32), torch.randn(256, 256)
    calls = max(args.calls // 8, 3) if batch > 1 else args.calls
    found: dict[str, list[float]] = {"quiet": [], "after torch": [], "a core taken": []}
    packed(images)
    for _ in range(args.rounds):
        found["quiet"] += milliseconds(lambda: packed(images), calls)
        found["after torch"] += milliseconds(lambda: packed(images), calls, lambda: square @ square)
        with core_taken(args.nice):
            found["a core taken"] += milliseconds(lambda: packed(images), calls)
    return found


def main() -> None:
    """Print the table."""
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    packed = biper.pack(biper.create_model(args.model, stage=2).eval())
    print(f"{args.model}, {args.threads} threads; medians over {args.rounds} rounds\n{machine()}\n")
    print("| batch | situation | ms | 90th percentile | times quiet |\n| --- | --- | --- | --- | --- |")
    for batch in BATCHES:
        found = measured(packed, batch, args)
        quiet = statistics.median(found["quiet"])
        for name, values in found.items():
            middle, high = statistics.median(values), statistics.quantiles(values, n=10)[-1]
            print(f"| {batch} | {name} | {middle:.2f} | {high:.2f} | {middle / quiet:.2f} |")


if __name__ == "__main__":
    run(main)
