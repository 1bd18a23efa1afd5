"""Evaluate a checkpoint on its test images. Writes nothing."""

import logging

from torch import nn

from biper.data.loaders import Shard, build_loaders, require_same_classes
from biper.models import Network
from biper.packed.network import PackedNetwork
from biper.training.acceleration import accelerate
from biper.training.distributed import Processes, joined
from biper.training.log import Progress
from biper.training.loop import Metrics, evaluate
from biper.training.process import describe_devices, name_out_of_memory, seed_everything, select_devices
from biper.training.settings import Settings

log = logging.getLogger("biper")
ALONE = Processes()


@name_out_of_memory()
def evaluate_checkpoint(network: Network | PackedNetwork, settings: Settings, processes: Processes = ALONE) -> Metrics:
    """Log and return the metrics of a loaded network, packed or not, over the test images.

    They are shared with the other processes if there are any.
    Normalization and classes are the network's own where it knows them. Raises UsageError if the data are others.
    """
    with joined(processes):
        return _evaluate(network, settings, processes)


def _evaluate(network: Network | PackedNetwork, settings: Settings, processes: Processes) -> Metrics:
    devices = select_devices(settings.device, settings.gpus, settings.type, processes)
    device = devices[0]
    seed_everything(settings.seed, settings.deterministic)
    m = network.metadata
    assert m is not None
    shard = Shard(processes.rank, processes.size)
    loaders = build_loaders(settings, device, shard=shard, train=False, mean=m.mean, std=m.std)
    require_same_classes(m, loaders)
    alone = len(devices) == 1
    fast: nn.Module
    if isinstance(network, PackedNetwork):
        fast, how = network.to(device), network.describe()
    else:
        fast = accelerate(network, device, amp=False, compiled=settings.compile and alone, steps=len(loaders.test))
        how = fast.describe()
    where = f"{describe_devices(devices)}: {how}"
    log.info("%s, stage %d, %s, on %s, %s", m.model, m.stage, m.quantizer_text, settings.dataset, where)
    if settings.use_dali and not loaders.in_memory:
        log.info("read with DALI, as in training unless --use_dali or --no-use_dali says otherwise")
    if not m.classes:
        log.info("a published checkpoint does not say its stage: read as stage %d", m.stage)
    model = fast if alone else nn.DataParallel(fast, devices)
    with Progress("evaluating", len(loaders.test), settings.print_freq) as progress:
        metrics = evaluate(model, loaders.test, progress)
    log.info(
        "top-1 %.2f %%  top-5 %.2f %%  loss %.4f  (%d images)", metrics.top1, metrics.top5, metrics.loss, metrics.count
    )
    return metrics
