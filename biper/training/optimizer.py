"""The optimizer of a run, and which of its parameters decay."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim

Decays = Callable[[str], bool]  # by a parameter's name
DECAYS: dict[str, Decays] = {
    "cifar10": lambda name: True,
    # the convolutions' (alpha included) and the classifier's; not batch norm's, not the downsampling branch's
    "imagenet": lambda name: name.rsplit(".", 2)[-2].startswith(("conv", "fc")),
}


def parameter_groups(model: nn.Module, family: str, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that decay and those that do not, as published for a family; a group that is empty is left out."""
    names = [name for name, _ in model.named_parameters()]
    decayed = {name for name in names if DECAYS[family](name)}
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in decayed], "weight_decay": weight_decay},
        {"params": [p for n, p in model.named_parameters() if n not in decayed], "weight_decay": 0.0},
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
