"""Every network by name, `<architecture>_<precision>`, in one registry for all families."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from biper.errors import UsageError
from biper.models.metadata import Metadata
from biper.nn.layers import BinaryConv2d, RealConv2d, RealLinear


class Network(nn.Module):
    """Base of every registered network: a module that knows what it is."""

    metadata: Metadata


@dataclass(frozen=True)
class Precision:
    """What the suffix of a model's name decides.

    conv(in_channels, out_channels, kernel_size, stride, padding, groups) builds a convolution of the body, without
    bias; activation is what follows its batch norm; real_conv and real_linear build the full-precision layers.
    """

    conv: Callable[..., nn.Module]
    activation: Callable[[Tensor], Tensor]
    real_conv: Callable[..., nn.Conv2d] = RealConv2d
    real_linear: Callable[..., nn.Linear] = RealLinear


Architecture = Callable[[int, Precision], Network]  # (num_classes, precision) -> network
PRECISIONS: dict[str, Callable[[float, int], Precision]] = {  # (freq, stage) -> precision
    "1w1a": lambda freq, stage: Precision(partial(BinaryConv2d, freq=freq, stage=stage), F.hardtanh),
    "1w32a": lambda freq, stage: Precision(
        partial(BinaryConv2d, freq=freq, stage=stage, binary_activations=False), F.relu
    ),
    "32w32a": lambda freq, stage: Precision(partial(nn.Conv2d, bias=False), F.hardtanh, nn.Conv2d, nn.Linear),
}
_ARCHITECTURES: dict[tuple[str, str], Architecture] = {}


def register(family: str, name: str) -> Callable[[Architecture], Architecture]:
    """Decorator: enters an architecture in the registry. Raises ValueError if the name is taken."""

    def enter(build: Architecture) -> Architecture:
        if (family, name) in _ARCHITECTURES:
            raise ValueError(f"{family} already has an architecture {name!r}")
        _ARCHITECTURES[family, name] = build
        return build

    return enter


def list_models(family: str = "cifar10") -> list[str]:
    """The names of a family's models, sorted. Raises UsageError (a ValueError) for an unknown family."""
    families = sorted({family for family, _ in _ARCHITECTURES})
    if family not in families:
        raise UsageError(f"unknown family {family!r}; choose from {', '.join(families)}")
    return sorted(f"{name}_{precision}" for (f, name) in _ARCHITECTURES if f == family for precision in PRECISIONS)


def create_model(
    name: str, family: str = "cifar10", num_classes: int = 10, freq: float = 20.0, stage: int = 1
) -> Network:
    """A freshly initialized network, `<architecture>_<precision>`, taking images (N, 3, H, W).

    Precisions: 1w1a binary weights and activations, 1w32a binary weights, 32w32a the full-precision twin. freq is in
    radians per unit weight; stage 1 has real weights sin(freq*w), stage 2 binary ones. Raises UsageError (a
    ValueError) for an unknown name. [BiPer, experiments]
    """
    if name not in list_models(family):
        raise UsageError(f"unknown model {name!r}; choose from {', '.join(list_models(family))}")
    if stage not in (1, 2):
        raise UsageError(f"stage is 1 (real weights) or 2 (binary weights), not {stage!r}")
    architecture, precision = name.rsplit("_", 1)
    network = _ARCHITECTURES[family, architecture](num_classes, PRECISIONS[precision](freq, stage))
    network.metadata = Metadata(name, family, num_classes, freq, stage)
    return network
