"""Pack a checkpoint, compare the result with it, and say what it came to."""

import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from biper.data.loaders import build_loaders
from biper.errors import Different, UsageError
from biper.models import Network
from biper.models.checkpoint import read_checkpoint
from biper.packed import file
from biper.packed.network import PackedNetwork
from biper.packed.onnx import export_onnx, require_exporter
from biper.packed.pack import pack
from biper.training.inheritance import evaluation
from biper.training.process import name_out_of_memory
from biper.training.settings import Settings

log = logging.getLogger("biper")
COMPARED, RANDOM = 256, 16  # images
BATCH = 16  # as many as a packed network takes at a time, so that torch's convolutions do the same in both
ROUNDS = 8  # of which the first does not count
TOLERANCE = 1e-4  # of logits


@dataclass(frozen=True)
class Agreement:
    """How two networks compare on some images: the largest difference of their logits, and equal predictions."""

    images: int
    difference: float
    equal: int


@name_out_of_memory()
def export(checkpoint: Path, target: Path, onnx: Path | None, given: dict[str, Any]) -> None:
    """Write the packed file of a checkpoint of stage 2, and an ONNX file, and log what they are.

    given: data_path, freq and model, if the user gave them. Raises UsageError for bad input, Different (and leaves no
    file) if the packed network's predictions are not the checkpoint's.
    """
    for path, ours in ((target, file.is_packed), (onnx, _is_onnx)):
        if path:
            _require_free(path, ours)
    if onnx:
        require_exporter()
        if onnx.absolute() == target.absolute():
            raise UsageError(f"-o and --onnx are the same file {target}: give two names")
    if file.is_packed(checkpoint):
        raise UsageError(f"{checkpoint} is packed already")
    network, config = evaluation(None, 2, {**given, "evaluate": str(checkpoint)})
    assert not isinstance(network, PackedNetwork)
    packed = pack(network)
    images, source = _images(network, config, "data_path" in given)
    agreement = compared(network, packed, images)
    log.info(
        "%s, stage %d: on %d %s the predictions of %d are equal, logits differ by at most %.1e",
        *(network.metadata.model, network.metadata.stage, agreement.images, source, agreement.equal),
        agreement.difference,
    )
    if agreement.equal < agreement.images or agreement.difference > TOLERANCE:
        raise Different("the packed network differs from the checkpoint: nothing was written; please report this")
    file.save_packed(packed, target, top1_of(read_checkpoint(checkpoint)))
    if not _same(file.load_packed(target), packed):
        target.unlink()
        raise Different(f"{target} does not hold what was written: it is removed; is the disk in order?")
    _log_sizes(network, checkpoint, target)
    _log_speed(network, packed)
    if onnx:
        export_onnx(packed, onnx, network.metadata.shown_size)
        log.info("%s: %s bytes, with weights -1 and +1 as floats", onnx, f"{onnx.stat().st_size:,}")


def top1_of(contents: dict[str, Any]) -> float | None:
    """The test accuracy of a checkpoint's own epoch in percent; of a published file, that of its best."""
    history = contents.get("history")
    value = history[-1].get("test_top1") if history else contents.get("best_prec1")
    return float(value) if isinstance(value, int | float | Tensor) else None


def _is_onnx(path: Path) -> bool:
    return path.suffix == ".onnx"


def _require_free(path: Path, ours: Callable[[Path], bool]) -> None:
    """Raise UsageError before work is done for a file that cannot be written, or would take the place of another."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"{path} cannot be written: " + ("it is a folder" if path.is_dir() else "no such folder"))
    if path.exists() and not (path.is_file() and ours(path)):
        raise UsageError(f"{path} exists and is another kind of file: give another name")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path} cannot be written: its folder is read-only")


def _images(network: Network, config: Settings, required: bool) -> tuple[Iterator[Tensor], str]:
    """Batches of normalized images to compare on, and what they are: test images where they are at hand."""
    m = network.metadata
    try:
        config = replace(config, batch_size_test=BATCH, use_dali=False, workers=0)
        loaders = build_loaders(config, torch.device("cpu"), train=False, mean=m.mean, std=m.std)
        return islice((images for images, _ in loaders.test.epoch()), COMPARED // BATCH), "test images"
    except UsageError as error:
        if required:
            raise
        log.info("compared on random images, because: %s", error)
    generator = torch.Generator().manual_seed(0)
    return iter([torch.randn(RANDOM, 3, m.shown_size, m.shown_size, generator=generator)]), "random images"


@torch.inference_mode()
def compared(network: torch.nn.Module, packed: PackedNetwork, batches: Iterator[Tensor]) -> Agreement:
    """Both networks on the same images (N, 3, H, W)."""
    count, difference, equal = 0, 0.0, 0
    for images in batches:
        expected, found = network(images), packed(images)
        count += len(images)
        difference = max(difference, (expected - found).abs().max().item())
        equal += int((expected.argmax(1) == found.argmax(1)).sum())
    return Agreement(count, difference, equal)


def _same(one: PackedNetwork, other: PackedNetwork) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@torch.inference_mode()
def _log_speed(network: Network, packed: PackedNetwork) -> None:
    """Both networks in turn, a few times; for figures to quote there is benchmarks/inference.py."""
    size = network.metadata.shown_size
    threads = torch.get_num_threads()
    for count in (1, 64):
        images = torch.randn(count, 3, size, size)
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for model, times in zip((network, packed), seconds, strict=True):
                start = time.perf_counter()
                model(images)
                times.append(time.perf_counter() - start)
        floats, bits = (1000 * statistics.median(times[1:]) for times in seconds)
        text = "%d image(s), %d threads: %.2f ms, in float32 %.2f ms: %.1f times as fast (%s)"
        log.info(text, count, threads, bits, floats, floats / bits, packed.describe())


def _log_sizes(network: Network, checkpoint: Path, target: Path) -> None:
    whole, floats = checkpoint.stat().st_size, sum(t.nbytes for t in network.state_dict().values())
    size = target.stat().st_size
    log.info("%s: %s bytes", checkpoint, f"{whole:,}")
    log.info("its network in float32: %s bytes", f"{floats:,}")
    log.info("%s: %s bytes, %.1f times smaller than the network in float32", target, f"{size:,}", floats / size)
