"""The optimizer of a run."""

from torch import nn, optim


def build_optimizer(model: nn.Module, *, name: str, lr: float, momentum: float, weight_decay: float) -> optim.Optimizer:
    """SGD with momentum, or Adam. Every trained parameter decays, as published for CIFAR.

    Raises ValueError for another name.
    """
    if name == "sgd":
        return optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=weight_decay)
    if name == "adam":
        return optim.Adam(model.parameters(), lr, weight_decay=weight_decay)
    raise ValueError(f"unknown optimizer {name!r}; choose from sgd, adam")
