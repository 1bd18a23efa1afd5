"""Write a packed network as C, compare it on this machine with what it was made of, and say what it came to."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from biper.data.loaders import build_loaders, require_same_classes
from biper.errors import CompilerMissing, Different, UsageError
from biper.files import folder_atomically
from biper.packed.c.export import export_c
from biper.packed.c.native import NativeNetwork
from biper.packed.c.plan import Plan
from biper.packed.network import PackedNetwork
from biper.training.export import RANDOMLY, asked_for_images, packable
from biper.training.process import name_out_of_memory
from biper.training.settings import Settings

log = logging.getLogger("biper")
CALIBRATION = (500, 100, 20)  # training images that integers' ranges are found on, as many of these as there are
COMPARED = 10_000  # test images at most
RANDOM = 16  # images where there are no test images
Batches = Iterator[tuple[Tensor, Tensor | None]]
ODD = 0.001  # of the classes: the stem's sums may end in another last digit, and a sign make much of it


@name_out_of_memory()
def write_c(file: Path, folder: Path, skips: str, given: dict[str, Any]) -> None:
    """Write a checkpoint's or packed file's C, and log its memory, its classes beside the packed network's, its top-1.

    given: data_path, dataset, freq and model, if the user gave them. Raises UsageError for bad input, Different (and
    leaves no folder) if the classes of C with float32 are others than the network's.
    """
    packed, settings = packable(file, given)
    calibration = _calibration(packed, settings, skips) if skips != "float32" else ()
    with folder_atomically(folder) as written:
        made = export_c(packed, written, skips=skips, calibration=calibration)
        _compare(packed, made, written, skips, _batches(packed, settings, asked_for_images(given)))
    log.info("%s: C99, %s bytes of RAM for the arena, numbers along the skips as %s", folder, f"{made.arena:,}", skips)


def _calibration(packed: PackedNetwork, settings: Settings, skips: str) -> Iterator[Tensor]:
    """Training images of all classes, normalized as the network's own."""
    m = packed.metadata
    assert m is not None
    for count in CALIBRATION:
        chosen = _plain(replace(settings, validation=max(count, m.num_classes)))
        try:
            loaders = build_loaders(chosen, torch.device("cpu"), train=False, mean=m.mean, std=m.std)
            break
        except UsageError as error:
            why = error
    else:
        text = f"--skips {skips} needs training images, for its scales (--dataset, --data_path)"
        raise UsageError(f"{text}: {why}") from why
    require_same_classes(m, loaders)
    return (images for images, _ in loaders.test.epoch())


def _plain(settings: Settings) -> Settings:
    return replace(settings, use_dali=False, workers=0, batch_size_test=100)


@torch.no_grad()
def _compare(packed: PackedNetwork, made: Plan, folder: Path, skips: str, batches: Batches) -> None:
    try:
        network = NativeNetwork(packed, made, folder)
    except CompilerMissing as error:
        log.info("the C was not run here: %s", error)
        return
    count = equal = right = ours = (
        0  # images, and those of which C's class is the network's, C's is right, the network's
    )
    tested = False
    for images, labels in batches:
        expected, found = packed(images).argmax(1), network(images).argmax(1)
        count, equal = count + len(images), equal + int((expected == found).sum())
        if labels is not None:
            tested = True
            right, ours = right + int((found == labels).sum()), ours + int((expected == labels).sum())
        if count >= COMPARED:
            break
    what = "test" if tested else "random"
    log.info(
        "C, run here: on %s %s images the classes of %s are the packed network's", f"{count:,}", what, f"{equal:,}"
    )
    if tested:
        log.info("top-1 of the C %.2f %%, of the packed network %.2f %%", 100 * right / count, 100 * ours / count)
    if skips == "float32" and equal < count * (1 - ODD) - 1:
        raise Different("the C computes other classes than the packed network: nothing was written; please report this")


def _batches(packed: PackedNetwork, settings: Settings, required: bool) -> Batches:
    """Normalized images, with labels where they are test images, which are `required` where the user said where."""
    m = packed.metadata
    assert m is not None
    try:
        loaders = build_loaders(_plain(settings), torch.device("cpu"), train=False, mean=m.mean, std=m.std)
        require_same_classes(m, loaders)
    except UsageError as error:
        if required:
            raise
        log.info(RANDOMLY, error)
        generator = torch.Generator().manual_seed(0)
        return iter([(torch.randn(RANDOM, 3, m.shown_size, m.shown_size, generator=generator), None)])
    return loaders.test.epoch()
