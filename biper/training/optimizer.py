"""The optimizer of a run, and which of its parameters decay."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from biper.errors import UsageError, shown
from biper.kinds import is_number
from biper.models.blocks import NO_WEIGHT_DECAY
from biper.models.fields import is_tensor
from biper.nn.activations import RPReLU
from biper.nn.layers import BinaryConv2d, BinaryLinear
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


@dataclass(frozen=True)
class Factors:
    """By what the learning rate is multiplied for alpha, and for the biases of batch norms."""

    alpha: float = 1.0
    norm_bias: float = 1.0

    def of(self, owner: nn.Module, name: str) -> float:
        """That of a module's own parameter."""
        if name == "alpha" and isinstance(owner, BinaryConv2d | BinaryLinear):
            return self.alpha
        return self.norm_bias if name == "bias" and isinstance(owner, _BatchNorm) else 1.0


EVEN = Factors()


def parameter_groups(
    model: nn.Module, family: str, weight_decay: float, factors: Factors = EVEN
) -> list[dict[str, Any]]:
    """The parameters that decay, then those that do not, each in the model's order; a group that is empty is left out.

    Those with a learning rate of their own follow, in groups with a `factor`. A parameter that several modules share is
    its first owner's.
    """
    kinds: dict[nn.Parameter, tuple[float, bool]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kinds.setdefault(parameter, (factors.of(module, name), decays(module, family)))
    groups = []
    for factor in (1.0, *sorted({factor for factor, _ in kinds.values()} - {1.0})):
        own = {} if factor == 1.0 else {"factor": factor}
        for decayed in (True, False):
            chosen = [p for p, kind in kinds.items() if kind == (factor, decayed)]
            groups.append({"params": chosen, "weight_decay": weight_decay if decayed else 0.0, **own})
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module,
    *,
    family: str,
    name: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    factors: Factors = EVEN,
) -> optim.Optimizer:
    """SGD with momentum, Adam or AdamW, with the family's groups. Raises ValueError for another name."""
    groups = parameter_groups(model, family, weight_decay, factors)
    if name == "sgd":
        return optim.SGD(groups, lr, momentum=momentum, nesterov=nesterov, fused=True)
    if name == "adam":
        return optim.Adam(groups, lr, fused=True)
    if name == "adamw":
        return optim.AdamW(groups, lr, fused=True)
    raise ValueError(f"unknown optimizer {name!r}; choose from sgd, adam, adamw")


def set_learning_rate(optimizer: optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)


def load_optimizer(optimizer: optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over a saved state, with its tensors laid out as the parameters are: the fused optimizers rely on it.

    Raises UsageError for one that is not of such an optimizer, or not finite.
    """
    _require_fit(optimizer, state)
    optimizer.load_state_dict(dict(state))
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)


def _require_fit(optimizer: optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Raise UsageError unless a saved state has the groups and parameters of an optimizer, and values of its kinds."""
    own = optimizer.state_dict()["param_groups"]
    groups = state["param_groups"]
    if [g.get("params") for g in groups] != [g["params"] for g in own]:
        raise UsageError("its optimizer has other parameters than the network")
    for mine, theirs in zip(own, groups, strict=True):
        for name, value in theirs.items():  # of another version of torch, which may have more of them or fewer
            if name in mine and _kind(value) != _kind(mine[name]):
                raise UsageError(f"its optimizer's {name} is {shown(value)}, here it is {shown(mine[name])}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        if type(number) is not int or not 0 <= number < len(parameters) or not isinstance(values, Mapping):
            raise UsageError(f"its optimizer has a state of {shown(number)}, which is none of its parameters")
        for name, value in values.items():
            if not _fits(value, parameters[number]):
                raise UsageError(f"its optimizer's {shown(name)} of parameter {number} is {shown(value)}")


def _kind(value: object) -> str:
    """The kind of a group's setting: whole and other numbers are one, and what is a sequence has its length."""
    if isinstance(value, list | tuple):
        return "".join(["(", *map(_kind, value), ")"])
    return "number" if type(value) in (int, float) else type(value).__name__


def _fits(value: object, parameter: Tensor) -> bool:
    """Whether a value is what optimizers keep of a parameter: nothing, a finite number, or a tensor of its shape."""
    if isinstance(value, Tensor):
        return is_tensor(value) and value.shape in (parameter.shape, ()) and bool(value.isfinite().all())
    return value is None or is_number(value)
