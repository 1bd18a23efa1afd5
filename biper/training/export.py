"""Pack a checkpoint, compare the result with it, and say what it came to."""

import json
import logging
import shlex
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from biper.data.loaders import build_loaders, require_same_classes
from biper.errors import Different, UsageError
from biper.files import atomically, require_different, require_empty, require_free, write_text
from biper.models import Network
from biper.models.checkpoint import read_checkpoint
from biper.packed import file
from biper.packed.network import PackedNetwork
from biper.packed.onnx import export_onnx, require_exporter
from biper.packed.pack import pack
from biper.packed.qonnx import require_bits, require_onnx
from biper.packed.web.export import find_clang
from biper.training.checkpoint import versions
from biper.training.inheritance import evaluation
from biper.training.process import name_out_of_memory
from biper.training.settings import Settings

log = logging.getLogger("biper")
COMPARED, RANDOM = 256, 16  # images
RANDOMLY = "compared on random images; for test images give --dataset, or --data_path (%s)"
BATCH = 16  # as many as a packed network takes at a time, so that torch's convolutions do the same in both
ROUNDS = 8  # of which the first does not count
TOLERANCE = 1e-4  # of logits


@dataclass(frozen=True)
class Agreement:
    """How two networks compare on some images: the largest difference of their logits, and equal predictions."""

    images: int
    difference: float
    equal: int


@dataclass(frozen=True)
class Speed:
    """The milliseconds that a batch of images takes, median of a few rounds."""

    images: int
    packed_ms: float
    float32_ms: float
    times_as_fast: float


@dataclass(frozen=True)
class Facts:
    """What an export came to: the JSON file of --facts."""

    model: str
    checkpoint: str  # paths are as they were given
    checkpoint_bytes: int
    float32_bytes: int  # of the network's parameters and statistics
    packed: str
    packed_bytes: int
    times_smaller: float  # than the network in float32
    onnx: str | None
    onnx_bytes: int | None
    compared_on: str  # test images or random images
    agreement: Agreement
    computes: str  # how the packed network does on this machine
    threads: int
    speeds: tuple[Speed, ...]
    versions: dict[str, str]


@name_out_of_memory()
def export(checkpoint: Path, target: Path, onnx: Path | None, given: dict[str, Any], facts: Path | None = None) -> None:
    """Write the packed file of a checkpoint of stage 2, an ONNX file and the facts as JSON, and log what they are.

    given: data_path, dataset, freq and model, if the user gave them. Raises UsageError for bad input, Different (and
    leaves no file) if the packed network's predictions are not the checkpoint's.
    """
    require_outputs({"-o": target, "--onnx": onnx, "--facts": facts})
    if file.is_packed(checkpoint):
        raise UsageError(f"{checkpoint} is packed already")
    network, config = evaluation(None, 2, {**given, "evaluate": str(checkpoint)})
    assert not isinstance(network, PackedNetwork)
    packed = as_packed(network, checkpoint)
    images, source = images_of(network, config, asked_for_images(given))
    agreement = compared(network, packed, images)
    log.info(
        "%s, stage %d: on %d %s the predictions of %d are equal, logits differ by at most %.1e",
        *(network.metadata.model, network.metadata.stage, agreement.images, source, agreement.equal),
        agreement.difference,
    )
    if agreement.equal < agreement.images or not agreement.difference <= TOLERANCE:
        raise Different("the packed network differs from the checkpoint: nothing was written; please report this")
    _save_verified(packed, target, top1_of(read_checkpoint(checkpoint)))
    found = _facts(network, packed, checkpoint, target, agreement, source)
    _log_facts(found)
    if onnx:
        found = replace(found, onnx=str(onnx), onnx_bytes=_write_onnx(packed, onnx))
    if facts:
        write_text(json.dumps(asdict(found), indent=2), facts)


def packable(path: Path, given: dict[str, Any]) -> tuple[PackedNetwork, Settings]:
    """A packed file's network, or that of a checkpoint packed, and the settings of its evaluation.

    given: data_path, dataset, freq and model, if the user gave them. Raises UsageError for what cannot be packed.
    """
    network, settings = evaluation(None, 2, {**given, "evaluate": str(path)})
    return as_packed(network, path), settings


def as_packed(network: Network | PackedNetwork, path: Path) -> PackedNetwork:
    """The network of a file, packed. Raises UsageError for one of stage 1, or that cannot be packed."""
    if isinstance(network, PackedNetwork):
        return network
    if network.metadata.stage == 1 and not network.metadata.model.endswith("_32w32a"):
        text = shlex.join(["biper", "train", "--stage", "2", "--load_ckpt_stage1", str(path)])
        raise UsageError(f"{path} is of stage 1, whose weights are real: train stage 2 from it, {text}")
    return pack(network)


@name_out_of_memory()
def write_onnx(path: Path, target: Path, given: dict[str, Any]) -> None:
    """Write the ONNX file of a checkpoint of stage 2 or of a packed file. Raises UsageError for bad input."""
    _write_onnx(packable(path, given)[0], target)


def _write_onnx(packed: PackedNetwork, target: Path) -> int:
    """Write an ONNX file, say so, and return its bytes."""
    assert packed.metadata is not None
    export_onnx(packed, target, packed.metadata.shown_size)
    size = target.stat().st_size
    log.info("%s: %s bytes, with weights -1 and +1 as floats", target, f"{size:,}")
    return size


def top1_of(contents: dict[str, Any]) -> float | None:
    """The test accuracy of a checkpoint's own epoch in percent; of a published file, that of its best."""
    history = contents.get("history")
    value = history[-1]["test_top1"] if history else contents.get("best_prec1")
    return float(value) if isinstance(value, int | float | Tensor) else None


def require_outputs(paths: dict[str, Path | None], bits: int | None = None) -> None:
    """Raise UsageError before work is done for what cannot be written. paths: by the flag; bits: those of --qonnx."""
    kinds = {"-o": file.is_ours, "--onnx": _is_onnx, "--facts": _is_facts, "--qonnx": _is_onnx}
    given = {flag: path for flag, path in paths.items() if path}
    for flag, path in given.items():
        if flag in kinds:
            require_free(path, kinds[flag])
        else:
            require_empty(path)
    require_different(given)
    if "--onnx" in given:
        require_exporter()
    if "--web" in given:
        find_clang()
    if "--qonnx" in given:
        require_onnx()
    elif bits is not None:
        raise UsageError("--bits is of --qonnx FILE.onnx, which is missing")
    require_bits(bits)


def _is_onnx(path: Path) -> bool:
    """Whether a file is ONNX with the input and the output of ours; it is read without the package onnx."""
    contents = path.read_bytes()
    return contents[:1] == b"\x08" and b"\x06images" in contents and b"\x06logits" in contents


def _is_facts(path: Path) -> bool:
    try:
        return set(json.loads(path.read_text())) == {f.name for f in fields(Facts)}
    except (ValueError, TypeError, RecursionError):
        return False


def asked_for_images(given: dict[str, Any]) -> bool:
    """Whether the user said which images to use, so that there is no going on without."""
    return "data_path" in given or "dataset" in given


def images_of(network: Network | PackedNetwork, config: Settings, required: bool) -> tuple[Iterator[Tensor], str]:
    """Batches of normalized images to compare on, and what they are: test images where they are at hand."""
    m = network.metadata
    assert m is not None
    try:
        config = replace(config, batch_size_test=BATCH, use_dali=False, workers=0)
        loaders = build_loaders(config, torch.device("cpu"), train=False, mean=m.mean, std=m.std)
        require_same_classes(m, loaders)
        return islice((images for images, _ in loaders.test.epoch()), COMPARED // BATCH), "test images"
    except UsageError as error:
        if required:
            raise
        log.info(RANDOMLY, error)
    generator = torch.Generator().manual_seed(0)
    return iter([torch.randn(RANDOM, 3, m.shown_size, m.shown_size, generator=generator)]), "random images"


@torch.inference_mode()
def compared(network: torch.nn.Module, packed: PackedNetwork, batches: Iterator[Tensor]) -> Agreement:
    """Both networks on the same images (N, 3, H, W). Raises UsageError if the logits are not finite."""
    count, difference, equal = 0, 0.0, 0
    for images in batches:
        expected, found = network(images), packed(images)
        if not bool(expected.isfinite().all()):
            raise UsageError("the checkpoint's logits are not finite: its weights are not those of a training")
        count += len(images)
        difference = max(difference, (expected - found).abs().max().item())
        equal += int((expected.argmax(1) == found.argmax(1)).sum())
    return Agreement(count, difference, equal)


def _save_verified(packed: PackedNetwork, target: Path, top1: float | None) -> None:
    """The packed file, read back before it takes its place. Raises Different, and leaves what stood there."""
    with atomically(target) as temporary:
        file.save_packed(packed, temporary, top1)
        try:
            same = _same(file.load_packed(temporary), packed)
        except UsageError:
            same = False
        if not same:
            raise Different(
                f"{target} did not read back as it was written, and is left as it was; is the disk in order?"
            )


def _same(one: PackedNetwork, other: PackedNetwork) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _facts(
    network: Network, packed: PackedNetwork, checkpoint: Path, target: Path, agreement: Agreement, source: str
) -> Facts:
    floats, size = sum(t.nbytes for t in network.state_dict().values()), target.stat().st_size
    return Facts(
        model=network.metadata.model,
        checkpoint=str(checkpoint),
        checkpoint_bytes=checkpoint.stat().st_size,
        float32_bytes=floats,
        packed=str(target),
        packed_bytes=size,
        times_smaller=floats / size,
        onnx=None,
        onnx_bytes=None,
        compared_on=source,
        agreement=agreement,
        computes=packed.describe(),
        threads=torch.get_num_threads(),
        speeds=tuple(_speed(network, packed, count) for count in (1, 64)),
        versions=versions(),
    )


@torch.inference_mode()
def _speed(network: Network, packed: PackedNetwork, count: int) -> Speed:
    """Both networks in turn, a few times; for figures to quote there is benchmarks/inference.py."""
    images = torch.randn(count, 3, network.metadata.shown_size, network.metadata.shown_size)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for model, times in zip((network, packed), seconds, strict=True):
            start = time.perf_counter()
            model(images)
            times.append(time.perf_counter() - start)
    floats, bits = (1000 * statistics.median(times[1:]) for times in seconds)
    return Speed(count, bits, floats, floats / bits)


def _log_facts(f: Facts) -> None:
    log.info("%s: %s bytes", f.checkpoint, f"{f.checkpoint_bytes:,}")
    log.info("its network in float32: %s bytes", f"{f.float32_bytes:,}")
    size = f"{f.packed_bytes:,}"
    log.info("%s: %s bytes, %.1f times smaller than the network in float32", f.packed, size, f.times_smaller)
    for s in f.speeds:
        text = "%d image(s), %d threads: %.2f ms, before packing %.2f ms: %.1f times as fast (%s)"
        log.info(text, s.images, f.threads, s.packed_ms, s.float32_ms, s.times_as_fast, f.computes)
