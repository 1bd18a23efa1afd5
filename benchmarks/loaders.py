"""Images per second of both loaders, beside the bare decoding rate of the machine.

python benchmarks/loaders.py --data_path FOLDER: any folder of class folders with images, such as ImageNet's train.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from biper.data.folder import open_image
from biper.data.loaders import build_loaders
from biper.data.pillow import count_cores
from biper.errors import UsageError
from biper.training.process import select_devices
from biper.training.settings import make_settings


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data_path", type=Path, required=True, help="a folder of class folders with images")
    parser.add_argument("--image_size", type=int, default=224, help="default 224")
    parser.add_argument("-b", "--batch_size", type=int, default=32, help="default 32")
    parser.add_argument("--workers", type=int, default=count_cores(), help="default: the cores")
    parser.add_argument(
        "--repeats", type=int, default=5, help="passes over the images, after one to warm up; default 5"
    )
    return parser.parse_args()


def measure_rates(one_pass: Callable[[int], int], repeats: int) -> list[float]:
    """Images per second of each pass; one_pass(number) reads them and returns how many there were."""
    one_pass(0)
    measured = []
    for number in range(1, repeats + 1):
        start = time.perf_counter()
        count = one_pass(number)
        measured.append(count / (time.perf_counter() - start))
    return measured


def make_decoding_pass(files: list[Path], threads: int) -> Callable[[int], int]:
    """Bare decoding by Pillow, which leaves Python's lock while it decodes: no resizing, no batches."""

    def one_pass(number: int) -> int:
        with ThreadPoolExecutor(threads) as pool:
            return sum(1 for _ in pool.map(open_image, files))

    return one_pass


def make_loading_pass(args: argparse.Namespace, data: Path, use_dali: bool, train: bool) -> Callable[[int], int]:
    """A pass of a loader, up to the normalized batch on the device."""
    given = {"dataset": "folder", "data_path": str(data), "image_size": args.image_size, "workers": args.workers}
    given |= {"batch_size": args.batch_size, "batch_size_test": args.batch_size, "use_dali": use_dali}
    loaders = build_loaders(make_settings("imagenet", 1, given), select_devices("auto", "0")[0])
    loader = loaders.train if train else loaders.test
    assert loader is not None
    return lambda number: sum(len(labels) for _, labels in loader.epoch(number))


def main() -> None:
    """Print the table."""
    args = parse_arguments()
    files = [file for file in sorted(args.data_path.glob("*/**/*")) if file.is_file()]
    if not files:
        sys.exit(f"error: no images in {args.data_path}: expected {args.data_path}/<class>/<image>")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} CPU cores"
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    print(
        f"{len(files)} images, {args.image_size}x{args.image_size}, batches of {args.batch_size}; {versions}, {device}"
    )
    print(f"images per second: median (least to most) of {args.repeats} passes\n")
    with TemporaryDirectory() as folder:
        for split in ("train", "val"):
            (Path(folder) / split).symlink_to(args.data_path.resolve())
        rows = {f"bare decoding, {args.workers} threads": make_decoding_pass(files, args.workers)}
        for name, use_dali in (("torchvision", False), ("DALI", True)):
            for split in ("training", "evaluation"):
                try:
                    rows[f"{name}, {split}"] = make_loading_pass(args, Path(folder), use_dali, split == "training")
                except UsageError as error:
                    print(f"{name} is left out: {error}", file=sys.stderr)
        for name, one_pass in rows.items():
            measured = measure_rates(one_pass, args.repeats)
            middle = statistics.median(measured)
            print(f"{name:28} {middle:8.1f}  ({min(measured):.1f} to {max(measured):.1f})", flush=True)


if __name__ == "__main__":
    main()
