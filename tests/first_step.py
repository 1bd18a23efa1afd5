"""Run by test_distributed, with and without torchrun: the gradients of the first step, and an evaluation.

Batch norm is frozen here: in training its statistics are each process's own.
"""

import sys
from pathlib import Path

import torch

from biper.training.distributed import joined, launched_processes
from biper.training.log import Progress
from biper.training.loop import evaluate, make_loss_terms, train_one_epoch
from biper.training.settings import make_settings
from biper.training.trainer import build_trainer


class Enough(Exception):
    """The first step is done."""


def first_step(_step, _totals):
    raise Enough


def main(data, size, dali, out):
    processes = launched_processes()
    given = {"dataset": "folder", "data_path": data, "image_size": size, "batch_size": 8, "batch_size_test": 6}
    given |= {"model": "resnet18_1w1a", "freq": 20.0, "results_dir": out, "workers": 1, "use_dali": dali}
    given["amp"] = "off"  # rounding to bfloat16 hides how well the sums of several processes agree
    with joined(processes):
        trainer = build_trainer(make_settings("imagenet", 1, given), processes)
        freeze(trainer.network, size)
        progress = Progress("step", 1, 100)
        metrics = evaluate(trainer.network, trainer.loaders.test, progress)
        try:
            options = {"epoch": 0, "terms": make_loss_terms(0.1), "watcher": progress, "after_step": first_step}
            train_one_epoch(trainer.model, trainer.loaders.train, trainer.optimizer, **options)
        except Enough:
            gradients = {name: p.grad for name, p in trainer.network.named_parameters()}
        means = {"loss": metrics.loss, "top1": metrics.top1, "top5": metrics.top5, "count": metrics.count}
        if processes.main:
            Path(out).mkdir()
            torch.save({"gradients": gradients, "metrics": means}, Path(out) / "first.pt")


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
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "dali", sys.argv[4])
