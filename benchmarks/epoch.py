"""A whole epoch of the training command on images in CIFAR-10's number and format: how much of it is not the model.

python benchmarks/epoch.py -a resnet20_1w1a: the images are noise, written to a temporary folder and read as CIFAR-10's.
"""

import argparse
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torchvision.datasets.cifar as cifar

from benchmarks.variants import machine
from biper.commands.train import main as train_main
from biper.training import acceleration, train
from biper.training.acceleration import Accelerated

CLASSES = 10


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The flags; those of the training command go on to it."""
    text = "Further flags, such as -a and -b, go to the training command."
    parser = argparse.ArgumentParser(description=f"{(__doc__ or '').splitlines()[0]} {text}")
    parser.add_argument("--images", type=int, default=50_000, help="training images; default 50000, as CIFAR-10 has")
    parser.add_argument("--tests", type=int, default=10_000, help="test images; default 10000, as CIFAR-10 has")
    return parser.parse_known_args()


def write_images(folder: Path, train_images: int, test_images: int) -> None:
    """Noise, in the files of CIFAR-10."""
    random = np.random.default_rng(0)
    root = folder / cifar.CIFAR10.base_folder
    root.mkdir()
    parts = [name for name, _ in cifar.CIFAR10.train_list]
    counts = {name: train_images // len(parts) for name in parts} | {cifar.CIFAR10.test_list[0][0]: test_images}
    for name, count in counts.items():
        images = random.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        labels = random.integers(0, CLASSES, count).tolist()
        (root / name).write_bytes(pickle.dumps({"data": images, "labels": labels}))
    names = {"label_names": [f"class {number}" for number in range(CLASSES)]}
    (root / cifar.CIFAR10.meta["filename"]).write_bytes(pickle.dumps(names))


class Stopwatch:
    """Seconds by what they were spent on, the device's work included."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, name: str, label: Callable[..., str]) -> None:  # noqa: ANN401
        """Time every call of owner.name from now on; label(*arguments) says under what."""
        function = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
            key, start = label(*arguments), time.perf_counter()
            result = function(*arguments, **options)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[key] = self.seconds.get(key, 0) + time.perf_counter() - start
            return result

        setattr(owner, name, timed)


def main() -> None:
    """Train one epoch and print where its time went."""
    args, options = arguments()
    watch = Stopwatch()
    watch.watch(Accelerated, "forward", lambda model, *_: "training" if model.training else "evaluation")
    for owner, name in (
        (torch.Tensor, "backward"),
        (torch.optim.SGD, "step"),
        (acceleration, "fused_regularizer"),
        (acceleration, "periodic_regularizer"),
    ):
        watch.watch(owner, name, lambda *_: "training")
    watch.watch(train, "run_epochs", lambda *_: "epoch")
    with TemporaryDirectory() as folder:
        write_images(Path(folder), args.images, args.tests)
        given = ["--data_path", folder, "--accept_checksums", "--results_dir", f"{folder}/run"]
        given += ["--epochs", "1", "--freq", "20", *options]
        start = time.perf_counter()
        train_main("cifar10", 1, given)
        command = time.perf_counter() - start
    epoch = watch.seconds["epoch"]
    print(f"\n{machine()}")
    print(f"the epoch {epoch:.2f} s, its saving and recording included; the command's start {command - epoch:.2f} s")
    training, evaluation = watch.seconds["training"], watch.seconds["evaluation"]
    print(f"training steps {training:.2f} s, evaluation's forward passes {evaluation:.2f} s")
    rest = epoch - training - evaluation
    print(f"all that is not the model: {rest:.2f} s, {100 * rest / epoch:.1f} % of the epoch")


if __name__ == "__main__":
    main()
