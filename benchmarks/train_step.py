"""Milliseconds of a training step: ours, the published formulation and the full-precision twin, in one process.

python benchmarks/train_step.py -a resnet20_1w1a -b 128: every way takes one step in turn, and the medians are printed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.variants import Case, Step, machine, positive, run, variants
from biper.training.process import flush_denormals, keep_memory, select_devices

WARM_UP = 2  # steps


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-a", "--model", default="resnet20_1w1a", help="default resnet20_1w1a")
    parser.add_argument("--family", choices=("cifar10", "imagenet"), default="cifar10", help="default cifar10")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2, help="default 2")
    parser.add_argument("-b", "--batch_size", type=positive, default=128, help="default 128")
    parser.add_argument("--steps", type=positive, default=15, help="timed steps of each way; default 15")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument(
        "--compilers", action=argparse.BooleanOptionalAction, default=True, help="the compiled twin too"
    )
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one way's peak memory, in a process of its own
    return parser.parse_args()


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(steps: dict[str, Step], device: torch.device, rounds: int) -> dict[str, float]:
    """The median seconds of each way, taken in turn so that a slow moment of the machine strikes all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + rounds):
        for name, step in steps.items():
            wait(device)
            start = time.perf_counter()
            step()
            wait(device)
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def status(field: str) -> float:
    """A figure of this process's memory in MiB, as Linux gives it: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def peak_memory(build: Callable[[], Step], case: Case) -> float:
    """MiB that three steps need at most, beyond those that the process had before it made the network."""
    if case.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(case.device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the largest so far is forgotten
    before = status("VmRSS") if case.device.type == "cpu" else torch.cuda.memory_allocated(case.device) / 2**20
    step = build()
    for _ in range(3):
        step()
    wait(case.device)
    peak = status("VmHWM") if case.device.type == "cpu" else torch.cuda.max_memory_allocated(case.device) / 2**20
    return peak - before


def peak_memory_alone(name: str) -> float | None:
    """peak_memory in a process of its own; None where a compiler's memory would hide the step's."""
    if "compiled" in name or name == "bare convolutions":
        return None
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def table(case: Case, seconds: dict[str, float], memory: dict[str, float | None]) -> str:
    """A line for every way, as Markdown."""
    fastest = min((name for name in seconds if name.startswith("twin")), key=lambda name: seconds[name])
    lines = ["| | ms | images/s | times eager | times the fastest twin | peak MiB |", "|" + " --- |" * 6]
    for name, value in seconds.items():
        peak = f"{memory[name]:,.0f}" if memory.get(name) else ""
        ratios = f"{seconds['eager'] / value:.2f} | {seconds[fastest] / value:.2f}"
        lines.append(f"| {name} | {1000 * value:,.1f} | {case.batch / value:,.0f} | {ratios} | {peak} |")
    ours, limit = seconds["ours"], seconds["bare convolutions"]
    more = 100 * (ours / seconds[fastest] - 1)
    lines.append(f"\nThe fastest twin: {fastest}; ours takes {abs(more):.0f} % {'more' if more > 0 else 'less'} time.")
    lines.append(f"The convolutions alone are {100 * limit / ours:.0f} % of ours.")
    if memory.get("ours") and memory.get("eager"):
        lines.append(f"Peak memory: {100 * (1 - memory['ours'] / memory['eager']):.0f} % under eager.")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    flush_denormals()
    keep_memory()
    args = arguments()
    case = Case(args.model, args.family, args.stage, args.batch_size, select_devices(args.device, "0")[0])
    ways = variants(case, args.compilers)
    if args.only:
        print(json.dumps(peak_memory(ways[args.only], case)))
        return
    print(f"{case.model} ({case.family}), stage {case.stage}, batch {case.batch}; median of {args.steps} steps")
    print(f"{machine()}\n")
    memory = {name: peak_memory_alone(name) for name in ways} if args.memory else {}
    seconds = timed({name: build() for name, build in ways.items()}, case.device, args.steps)
    print(table(case, seconds, memory))


if __name__ == "__main__":
    run(main)
