"""Images per second and memory of our training step against the batch size, and with two processes.

python benchmarks/scaling.py -a resnet20_1w1a: processes share the batch and the cores, over gloo or, on GPUs, NCCL.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from benchmarks.train_step import peak_memory, timed
from benchmarks.variants import CLASSES, TAU, Case, Step, machine, optimizer_step, ours, positive, run
from biper.models import create_model
from biper.training.acceleration import accelerate, chosen_amp
from biper.training.distributed import Processes, joined, launched_processes, replicated
from biper.training.process import flush_denormals, keep_memory, select_devices


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-a", "--model", default="resnet20_1w1a", help="default resnet20_1w1a")
    parser.add_argument("--family", choices=("cifar10", "imagenet"), default="cifar10", help="default cifar10")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2, help="default 2")
    parser.add_argument(
        "-b", "--batch_sizes", type=positive, nargs="+", default=[32, 64, 128, 256], help="images in all"
    )
    parser.add_argument("--processes", type=positive, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument("--steps", type=positive, default=10, help="timed steps of each; default 10")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # what torchrun starts
    return parser.parse_args()


def shared_step(case: Case) -> Step:
    """Our step, with gradients averaged over the processes."""
    network = create_model(
        case.model, family=case.family, num_classes=CLASSES[case.family], freq=20.0, stage=case.stage
    )
    amp = chosen_amp("auto", case.device) == "bf16"
    fast = accelerate(network, case.device, amp=amp, compiled=True, steps=10**6)
    model = replicated(fast.train())
    images, labels, tau = case.images(), case.labels(), TAU[case.family]

    def loss() -> torch.Tensor:
        value = F.cross_entropy(model(images), labels)
        return value + fast.regularizer(fast, tau) if tau else value

    return optimizer_step(case, network, loss, fused=True)


def work(args: argparse.Namespace, processes: Processes) -> None:
    """Print the seconds of a step and the MiB that this process needed for it."""
    case = Case(args.model, args.family, args.stage, args.batch_sizes[0] // processes.size, torch.device("cpu"))
    case = replace(case, device=select_devices("auto", "0", processes=processes)[0])
    made: list[Step] = []

    def build() -> Step:
        made.append(shared_step(case) if processes.size > 1 else ours(case))
        return made[0]

    with joined(processes):
        memory = peak_memory(build, case)
        seconds = timed({"ours": made[0]}, case.device, args.steps)["ours"]
    if processes.main:
        print(json.dumps([seconds, memory]))


def measured(batch: int, processes: int) -> tuple[float, float]:
    """Seconds a step and MiB a process, in processes of their own, which share the cores."""
    threads = str(max(1, torch.get_num_threads() // processes))
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launch, __file__, *sys.argv[1:], "-b", str(batch), "--worker"]
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    seconds, memory = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    return seconds, memory


def main() -> None:
    """Print the table."""
    flush_denormals()
    keep_memory()
    args = arguments()
    if args.worker:
        work(args, launched_processes())
        return
    print(f"{args.model} ({args.family}), stage {args.stage}; median of {args.steps} steps\n{machine()}\n")
    print("| batch, in all | processes | ms | images/s | peak MiB a process |\n|" + " --- |" * 5)
    for processes in args.processes:
        for batch in args.batch_sizes:
            seconds, memory = measured(batch, processes)
            print(
                f"| {batch} | {processes} | {1000 * seconds:,.1f} | {batch / seconds:,.0f} | {memory:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    run(main)
