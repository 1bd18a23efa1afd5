"""Run by test_distributed, by torchrun and in its own process: the gradients of the first step, and an evaluation.

Batch norm is frozen here: in training its statistics are each process's own. In float64, where no activation's sign
rests on the rounding of a sum, and on images that are the same to the last bit: all but the light, a matrix product.
"""

import sys
from dataclasses import replace

import torch

from biper.training import build
from biper.training.distributed import joined, launched_processes
from biper.training.log import Progress
from biper.training.loop import evaluate, train_one_epoch
from biper.training.loss import make_loss_terms
from biper.training.settings import make_settings
from biper.training.step import PlainStep


class Enough(Exception):
    """The first step is done."""


def first_step(_step, _totals):
    raise Enough


def main(data, size, out, loaders):
    processes = launched_processes()
    build.initial_network = in_float64(build.initial_network)
    with joined(processes):
        found = {loader: run(processes, data, size, out, loader == "dali") for loader in loaders}
        if processes.main:
            torch.save(found, out)


def run(processes, data, size, out, dali):
    given = {"dataset": "folder", "data_path": data, "image_size": size, "batch_size": 8, "batch_size_test": 6}
    given |= {"model": "resnet18_1w1a", "freq": 20.0, "results_dir": f"{out}.run", "workers": 1, "use_dali": dali}
    given["amp"] = "off"  # rounding to bfloat16 hides how well the sums of several processes agree
    trainer = build.build_trainer(make_settings("imagenet", 1, given), processes)
    trainer.loaders.train.augmentation = replace(trainer.loaders.train.augmentation, lighting=0.0)
    freeze(trainer.network, size)
    progress = Progress("step", 1, 100)
    metrics = evaluate(trainer.network, trainer.loaders.test, progress)
    try:
        step = PlainStep(trainer.model, trainer.optimizer, make_loss_terms(0.1))
        train_one_epoch(step, trainer.loaders.train, epoch=0, watcher=progress, after_step=first_step)
    except Enough:
        gradients = {name: p.grad for name, p in trainer.network.named_parameters()}
    means = {"loss": metrics.loss, "top1": metrics.top1, "top5": metrics.top5, "count": metrics.count}
    return {"gradients": gradients, "metrics": means}


def in_float64(initial_network):
    def build(*given):
        network = initial_network(*given).double()
        network.register_forward_pre_hook(lambda _, inputs: inputs[0].double())
        return network

    return build


def freeze(network, size):
    """Batch norms with a gain of one and the statistics of noise, which stay as they are."""
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)]
    for norm in norms:
        torch.nn.init.ones_(norm.weight)
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(0)))
    for norm in norms:
        norm.train = lambda mode=True, norm=norm: torch.nn.Module.train(norm, False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
