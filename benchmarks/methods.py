"""Every weight quantizer with every input quantizer and activation, on scikit-learn's digits: does all of it hold?

python benchmarks/methods.py --out FOLDER: each combination is trained for a few epochs, binary from the start. A second
run is killed (SIGKILL) at a random moment, goes on, and must end bit for bit as the first. The network is packed,
saved, loaded, and must give equal logits, and in onnxruntime equal classes but for one image in a hundred: its stem
convolves in another order, and a network of a few epochs has many logits that are almost equal.
"""

import argparse
import csv
import itertools
import multiprocessing
import os
import random
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import biper
from benchmarks.variants import machine
from biper.data.digits import DIGITS, read_digits
from biper.experiments.tables import markdown
from biper.files import write_rows, write_text
from biper.lifetime import end_with_parent
from biper.models.checkpoint import read_checkpoint
from biper.training.checkpoint import BEST, LATEST
from biper.training.inheritance import training_config
from biper.training.train import train

WEIGHTS = ("biper", "sign", "xnor", "irnet", "recu")
INPUTS = ("biper", "bireal", "sign", "rsign", "irnet")
ACTIVATIONS = ("hardtanh", "prelu", "rprelu")
MODEL, SIZE, TIMES = "resnet20_1w1a", 8, 3  # of the network, its images' side, and seconds within which a run is killed
TRAINING, TESTS = 1437, 360  # images of the data set
PROCESSES = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Outcome:
    """What a combination came to. logits: the largest difference of the packed network's.

    killed_after: steps that were saved then; onnx_classes: how many of TESTS images have the same class in onnxruntime.
    """

    weights: str
    inputs: str
    activation: str
    first_loss: float
    last_loss: float
    top1: float
    killed_after: int
    resumed_exactly: bool
    logits: float
    onnx_classes: int

    @property
    def holds(self) -> bool:
        """Whether all is as it should be."""
        learned = self.last_loss < self.first_loss
        return learned and self.resumed_exactly and self.logits == 0 and self.onnx_classes >= 0.99 * TESTS


def settings(method: tuple[str, str, str], folder: Path, epochs: int) -> dict[str, Any]:
    """The recipe of all of them."""
    given = dict(zip(("quantizer", "input_quantizer", "activation"), method, strict=True))
    given |= {"model": MODEL, "freq": 20.0, "from_scratch": True, "dataset": "digits", "image_size": SIZE, "lr": 0.05}
    given |= {"epochs": epochs, "batch_size": 64, "checkpoint_minutes": 0.002, "device": "cpu", "workers": 0}
    return {**given, "results_dir": str(folder), "resume": folder.exists()}


def run(method: tuple[str, str, str], folder: Path, epochs: int) -> None:
    """A training, in a process of its own."""
    end_with_parent()
    torch.set_num_threads(1)
    train(training_config("cifar10", 2, settings(method, folder, epochs)))


def started(target: Any, *arguments: Any) -> BaseProcess:  # noqa: ANN401
    """A process that does it."""
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    return process


def finish(process: BaseProcess) -> None:
    """Wait for a process. Raises RuntimeError if it fails."""
    process.join()
    if process.exitcode:
        raise RuntimeError(f"a process ended with {process.exitcode}")


def kill_within(process: BaseProcess, folder: Path, seconds: float) -> int:
    """Kill a training some seconds after its first checkpoint, or less if it ends; how many steps are saved."""
    while process.is_alive() and not (folder / LATEST).exists():
        time.sleep(0.01)
    process.join(seconds)
    process.kill()
    process.join()
    saved = read_checkpoint(folder / LATEST)
    return int(saved["epoch"] * -(-TRAINING // 64) + saved["step"])


def same_state(one: Path, other: Path) -> bool:
    """Whether two runs ended bit for bit alike: weights, optimizer, history."""
    a, b = (read_checkpoint(folder / LATEST) for folder in (one, other))
    momenta = [[v["momentum_buffer"] for v in c["optimizer"]["state"].values()] for c in (a, b)]
    pairs = [*zip(a["state_dict"].values(), b["state_dict"].values(), strict=True), *zip(*momenta, strict=True)]
    return a["history"] == b["history"] and all(torch.equal(x, y) for x, y in pairs)


def deploy(folder: Path) -> None:
    """Pack, save, load, export, and compare on the test images; the result goes into a file of the folder."""
    import onnxruntime

    torch.set_num_threads(1)
    network = biper.load_checkpoint(folder / BEST)
    biper.save_packed(biper.pack(network), folder / "packed.safetensors")
    packed = biper.load_packed(folder / "packed.safetensors")
    biper.export_onnx(packed, folder / "network.onnx", SIZE)
    pixels = read_digits(False, SIZE).pixels.float() / 255
    images = ((pixels - torch.tensor(DIGITS.mean)) / torch.tensor(DIGITS.std)).permute(0, 3, 1, 2).contiguous()
    with torch.inference_mode():
        expected, found = network(images), packed(images)
    logits = onnxruntime.InferenceSession(folder / "network.onnx").run(None, {"images": images.numpy()})[0]
    equal = int((torch.from_numpy(logits).argmax(1) == expected.argmax(1)).sum())
    write_rows([{"logits": (expected - found).abs().max().item(), "onnx_classes": equal}], folder / "deployed.csv")


def outcome(method: tuple[str, str, str], folder: Path, epochs: int) -> Outcome:
    """All that there is to show of a combination."""
    whole, killed = folder / "whole", folder / "killed"
    for place in (whole, killed):
        shutil.rmtree(place, ignore_errors=True)
    finish(started(run, method, whole, epochs))
    victim = started(run, method, killed, epochs)
    steps = kill_within(victim, killed, random.Random("".join(method)).uniform(0, TIMES))
    finish(started(run, method, killed, epochs))
    finish(started(deploy, whole))
    history = read_checkpoint(whole / LATEST)["history"]
    losses = [row["train_loss"] for row in history]
    with (whole / "deployed.csv").open() as file:
        deployed = next(csv.DictReader(file))
    exact, top1 = same_state(whole, killed), max(row["test_top1"] for row in history)
    logits, classes = float(deployed["logits"]), int(deployed["onnx_classes"])
    return Outcome(*method, losses[0], losses[-1], top1, steps, exact, logits, classes)


def write_table(outcomes: list[Outcome], out: Path, epochs: int) -> None:
    """methods.csv and methods.md."""
    write_rows([asdict(o) for o in outcomes], out / "methods.csv")
    head = [f.name.replace("_", " ") for f in fields(Outcome)]
    rows = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in asdict(o).values()] for o in outcomes]
    facts = f"`{MODEL}` on {DIGITS.title}, {SIZE}x{SIZE}, {epochs} epochs, {TESTS} test images, seed 0. {machine()}"
    write_text(f"# Methods\n\n{facts}\n\n{markdown(head, rows)}", out / "methods.md")


def main() -> None:
    """Do what is missing, two at a time, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the table, methods.md and .csv")
    parser.add_argument("--epochs", type=int, default=3, help="default 3")
    for name, values in (("weights", WEIGHTS), ("inputs", INPUTS), ("activations", ACTIVATIONS)):
        parser.add_argument(f"--{name}", nargs="+", choices=values, default=values)
    a = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    PROCESSES.set_forkserver_preload(["benchmarks.methods"])
    methods = list(itertools.product(a.weights, a.inputs, a.activations))

    def do(method: tuple[str, str, str]) -> Outcome:
        found = outcome(method, a.out / "runs" / "_".join(method), a.epochs)
        print(" ".join(method), "holds" if found.holds else f"FAILS: {found}", flush=True)
        return found

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(do, methods))
    write_table(outcomes, a.out, a.epochs)
    failed = [o for o in outcomes if not o.holds]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} hold")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
