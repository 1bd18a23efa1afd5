"""The optimizer of a run, and which of its parameters decay."""

from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn.modules.conv import _ConvNd

from biper.models.blocks import NO_WEIGHT_DECAY
from biper.nn.activations import RPReLU
from biper.nn.quantizers import Quantizer


def decays(owner: nn.Module, family: str) -> bool:
    """Whether a module's own parameters decay, as published for a family.

    Learned thresholds, slopes and shifts, which no published BiPer network has, never do. CIFAR's: all others.
    ImageNet's: those of convolutions (alpha included) and linear layers, unless the architecture has marked the layer
    by `without_weight_decay`; not those of norms, nor of the model itself.
    """
    if isinstance(owner, Quantizer | nn.PReLU | RPReLU):
        return False
    if family != "imagenet":
        return True
    return isinstance(owner, _ConvNd | nn.Linear) and not getattr(owner, NO_WEIGHT_DECAY, False)


def parameter_groups(model: nn.Module, family: str, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that decay, then those that do not, each in the model's order; a group that is empty is left out.

    A parameter that several modules share is its first owner's.
    """
    decayed: dict[nn.Parameter, bool] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            decayed.setdefault(parameter, decays(module, family))
    groups = [
        {"params": [p for p, decay in decayed.items() if decay], "weight_decay": weight_decay},
        {"params": [p for p, decay in decayed.items() if not decay], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, *, family: str, name: str, lr: float, momentum: float, weight_decay: float
) -> optim.Optimizer:
    """SGD with momentum, or Adam, with the family's weight-decay groups. Raises ValueError for another name."""
    groups = parameter_groups(model, family, weight_decay)
    if name == "sgd":
        return optim.SGD(groups, lr, momentum=momentum, fused=True)
    if name == "adam":
        return optim.Adam(groups, lr, fused=True)
    raise ValueError(f"unknown optimizer {name!r}; choose from sgd, adam")


def load_optimizer(optimizer: optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over a saved state, with its tensors laid out as the parameters are: the fused optimizers rely on it."""
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)
