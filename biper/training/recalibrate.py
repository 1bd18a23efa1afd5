"""Batch norm's statistics measured anew: over the training images, by the weights that a checkpoint ends with.

In training they are a moving average over weights that have changed since, and the next binary layer's signs rest on
them. Whether it is worth it the metrics before and after say, network by network.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from biper.data.loaders import Loader, build_loaders, require_same_classes
from biper.errors import UsageError
from biper.files import require_different, require_free
from biper.models import Network
from biper.models.checkpoint import FORMAT, read_checkpoint
from biper.packed.file import is_packed
from biper.packed.network import PackedNetwork
from biper.training.acceleration import accelerate
from biper.training.checkpoint import save_checkpoint, versions
from biper.training.inheritance import evaluation
from biper.training.log import Progress
from biper.training.loop import Metrics, check_finite, evaluate
from biper.training.process import describe_devices, name_out_of_memory, seed_everything, select_devices
from biper.training.run_folder import settings_of
from biper.training.settings import Settings

log = logging.getLogger("biper")
SEEN = ("batch_size", "validation", "seed", "flip", "padding", "cutout")  # the settings that training images depend on
KEPT = ("epoch", "model", "progress", "settings")  # of the checkpoint, whose history belongs to other statistics


@name_out_of_memory()
def recalibrate(checkpoint: Path, target: Path, given: dict[str, Any]) -> tuple[Metrics, Metrics]:
    """Write a checkpoint with the statistics of one pass over the training images; return the metrics before and after.

    The images come augmented as in training, in batches, each of which counts alike; MixUp's mixing is left out. The
    metrics are those of the test images, or of the training images that the checkpoint's run held out. given: settings
    of data and hardware, as in an evaluation. Raises UsageError for bad input, a network without batch norm, or data
    other than the checkpoint's, and TrainingDiverged where a statistic is not finite.
    """
    contents = _contents(checkpoint)
    _require_target(target)
    require_different({"CHECKPOINT": checkpoint, "-o": target})
    saved = settings_of(contents)
    seen = {name: saved[name] for name in SEEN if name in saved}
    network, config = evaluation(None, 2, seen | given | {"evaluate": str(checkpoint)})
    assert not isinstance(network, PackedNetwork)
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()):
        raise UsageError(f"{checkpoint} has no batch norm to recalibrate")
    device = select_devices(config.device, config.gpus, config.type)[0]
    seed_everything(config.seed, config.deterministic)
    m = network.metadata
    loaders = build_loaders(config, device, mean=m.mean, std=m.std)
    require_same_classes(m, loaders)
    assert loaders.train is not None
    kind = "held-out training" if config.validation else "test"
    text = "%s, stage %d, on %s: %s training and %s %s images"
    counts = f"{loaders.train.count:,}", f"{loaders.test.count:,}"
    log.info(text, m.model, m.stage, describe_devices([device]), *counts, kind)

    before = _measured("before", network, loaders.test, config)
    update_bn(_images(loaders.train, config.print_freq), network)
    check_finite(network, "after recalibration")
    after = _measured("after", network, loaders.test, config)
    kept = {name: contents[name] for name in KEPT if name in contents}
    scores = {"best_prec1": after.top1, "best_prec5": after.top5}
    own = {"format": FORMAT, "state_dict": network.state_dict(), "metadata": m.to_plain(), "versions": versions()}
    save_checkpoint({**kept, **scores, **own, "recalibrated": True}, target)
    log.info("wrote %s", target)
    return before, after


def _measured(when: str, network: Network, loader: Loader, settings: Settings) -> Metrics:
    fast = accelerate(network, loader.device, amp=False, compiled=settings.compile, steps=len(loader))
    with Progress(when, len(loader), settings.print_freq) as progress:
        metrics = evaluate(fast, loader, progress, f"the evaluation {when}")
    log.info("%s: top-1 %.2f %%  top-5 %.2f %%  loss %.4f", when, metrics.top1, metrics.top5, metrics.loss)
    return metrics


def _images(loader: Loader, print_freq: int) -> Iterator[Tensor]:
    """The batches of an epoch without their labels."""
    with Progress("recalibrating", len(loader), print_freq) as progress:
        for step, (images, _) in enumerate(loader.epoch(0), 1):
            yield images
            progress.advance(step, None)


def _contents(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds. Raises UsageError for a packed file, and for a published one, which hides its stage."""
    if is_packed(checkpoint):
        raise UsageError(f"{checkpoint} is packed: recalibrate the checkpoint that it was made of")
    contents = read_checkpoint(checkpoint)
    if "format" not in contents:
        raise UsageError(f"{checkpoint} is of the published code and does not say its stage: give one of ours")
    return contents


def _require_target(target: Path) -> None:
    """Raise UsageError for a file that cannot be written, or that is not one of this command's own."""
    require_free(target, lambda path: True)
    if target.suffix == ".safetensors":
        raise UsageError(f"{target} has the name of a packed file: give another, such as {target.stem}.pth.tar")
    if target.exists() and not _is_recalibrated(target):
        raise UsageError(f"{target} exists and was not written by recalibrate: give another name")


def _is_recalibrated(path: Path) -> bool:
    try:
        return bool(read_checkpoint(path).get("recalibrated"))
    except UsageError:
        return False
