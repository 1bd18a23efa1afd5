"""Every network by name, `<architecture>_<precision>`, in one registry for all families."""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from biper.errors import UsageError, told
from biper.models.metadata import Metadata, biper_activation
from biper.nn import DEFAULT_FREQ
from biper.nn.activations import ACTIVATIONS
from biper.nn.layers import BinaryConv2d, RealConv2d, RealLinear, binary_layers
from biper.nn.quantizers import (
    INPUT_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    InputQuantizer,
    PolynomialSign,
    Sine,
    SquareWave,
    WeightQuantizer,
    build_quantizer,
    describe,
)

FAMILIES = {"cifar10": 10, "imagenet": 1000}  # the families, and how many classes their models have by default


class Network(nn.Module):
    """Base of every registered network: a module that knows what it is."""

    @property
    def metadata(self) -> Metadata:
        """What it is; its quantizers are those that its layers have now."""
        metadata: Metadata = self.__dict__["_metadata"]
        layers = [layer for _, layer in binary_layers(self)]
        if not layers:
            return metadata
        weights = [describe(layer.weight_quantizer) for layer in layers]
        inputs = [None if layer.input_quantizer is None else describe(layer.input_quantizer) for layer in layers]
        if weights.count(weights[0]) < len(layers) or inputs.count(inputs[0]) < len(layers):
            raise UsageError("the layers have different quantizers, which metadata, and so a file, cannot say")
        return replace(metadata, weight_quantizer=weights[0], input_quantizer=inputs[0])

    @metadata.setter
    def metadata(self, value: Metadata) -> None:
        self.__dict__["_metadata"] = value


@dataclass(frozen=True)
class Precision:
    """What the suffix of a model's name decides.

    conv(in_channels, out_channels, kernel_size, stride, padding, groups) builds a convolution of the body, without
    bias; activation(channels) what follows its batch norm; real_conv and real_linear the full-precision layers.
    """

    conv: Callable[..., nn.Module]
    activation: Callable[[int], nn.Module]
    real_conv: Callable[..., nn.Conv2d] = RealConv2d
    real_linear: Callable[..., nn.Linear] = RealLinear


Build = Callable[[int, Precision], Network]  # (num_classes, precision) -> network


@dataclass(frozen=True)
class Architecture:
    """How a network is built, and the input quantizer and the activation that it has by default."""

    build: Build
    input_quantizer: InputQuantizer
    activation: str


# of the body, by a name's suffix, from the quantizers of weights and inputs
CONVOLUTIONS: dict[str, Callable[[WeightQuantizer, InputQuantizer], Callable[..., nn.Module]]] = {
    "1w1a": lambda w, a: partial(BinaryConv2d, weight_quantizer=w, input_quantizer=a),
    "1w32a": lambda w, a: partial(BinaryConv2d, weight_quantizer=w, input_quantizer=None),
    "32w32a": lambda w, a: partial(nn.Conv2d, bias=False),
}
_ARCHITECTURES: dict[tuple[str, str], Architecture] = {}


def register_model(
    family: str, name: str, *, input_quantizer: InputQuantizer | None = None, activation: str = ""
) -> Callable[[Build], Build]:
    """Decorator: enters an architecture, (num_classes, precision) -> Network, in the registry of its family.

    input_quantizer, activation: what it has by default, in the place of BiPer's polynomial sign and hardtanh (relu for
    real activations). Raises UsageError (a ValueError) if the name is taken or the family or the activation is unknown.
    """
    if family not in FAMILIES:
        raise UsageError(f"unknown family {family!r}; choose from {', '.join(FAMILIES)}")
    if activation and activation not in ACTIVATIONS:
        raise UsageError(f"unknown activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")

    def enter(build: Build) -> Build:
        there = _ARCHITECTURES.get((family, name))
        if there is not None and _path(there.build) != _path(build):  # a notebook's cell may run again
            raise UsageError(f"{family} already has an architecture {name!r}")
        _ARCHITECTURES[family, name] = Architecture(build, input_quantizer or PolynomialSign(), activation)
        return build

    return enter


def _path(build: Build) -> str:
    return f"{build.__module__}.{getattr(build, '__qualname__', build)}"


def list_models(family: str | None = None) -> list[str]:
    """The names of all models, or of a family's, sorted. Raises UsageError (a ValueError) for an unknown family."""
    if family is not None and family not in FAMILIES:
        raise UsageError(f"unknown family {family!r}; choose from {', '.join(FAMILIES)}")
    names = {name for f, name in _ARCHITECTURES if family in (None, f)}
    return sorted(f"{name}_{precision}" for name in names for precision in CONVOLUTIONS)


def unknown_model(name: str, family: str | None = None) -> UsageError:
    """The error that names the architectures of a family, or of all, and the precisions that each has."""
    bodies = sorted({name for f, name in _ARCHITECTURES if family in (None, f)})
    choices = f"choose from {', '.join(bodies)}, each with _{', _'.join(CONVOLUTIONS)}"
    whole = [f"{body}_{precision}" for body in bodies for precision in CONVOLUTIONS]
    elsewhere = [other for other in FAMILIES if family is not None and name in list_models(other)]
    if elsewhere:
        return UsageError(f"{name} is a network for {elsewhere[0]}'s images, not for {family}'s; {choices}")
    near = difflib.get_close_matches(name, whole, n=1, cutoff=0.75)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return UsageError(f"unknown model {name!r}; {choices}, or --import FILE.py that registers it{meant}")


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint_path: str | os.PathLike[str] | None = None,
    *,
    family: str | None = None,
    num_classes: int | None = None,
    freq: float | None = None,
    stage: int | None = None,
    weight_quantizer: WeightQuantizer | None = None,
    input_quantizer: InputQuantizer | None = None,
    activation: str | None = None,
) -> Network:
    """A network `<architecture>_<precision>` that takes images (N, 3, H, W), freshly initialized or as it was saved.

    Precisions: 1w1a binary weights and activations, 1w32a binary weights, 32w32a the full-precision twin.

    pretrained: with the weights that come with biper; checkpoint_path: with those of a file. Such a network is in
    evaluation mode, and what else is given here must agree with its file.
    family: cifar10 or imagenet, for a name that both have, cifar10 if absent. num_classes: by default 10, ImageNet's
    1,000. The binary layers take the quantizers given; by default BiPer's of a stage (1: real weights sin(freq*w), 2:
    binary ones), with freq in radians per unit weight, and BiPer's inputs, ReActNet's in `*_react`. activation: one of
    hardtanh, relu, prelu, rprelu, by default hardtanh; relu for 1w32a, rprelu for `*_react`. Raises UsageError (a
    ValueError) for an unknown name, or for arguments that contradict each other. [BiPer, experiments]
    """
    if name not in list_models(family):
        raise unknown_model(name, family)
    _require_sense(name, num_classes, freq, stage, weight_quantizer, input_quantizer)
    if activation is not None and activation not in ACTIVATIONS:
        raise UsageError(f"unknown activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")
    if pretrained or checkpoint_path is not None:
        from biper.models.checkpoint import load_model  # which makes its networks here

        if (weight_quantizer, input_quantizer, activation) != (None, None, None):
            raise UsageError(
                "a file says what its network has: leave weight_quantizer, input_quantizer and activation out"
            )
        return load_model(name, checkpoint_path, family=family, num_classes=num_classes, freq=freq, stage=stage)
    if weight_quantizer is None:
        frequency = DEFAULT_FREQ if freq is None else freq
        weight_quantizer = SquareWave(frequency) if stage == 2 else Sine(frequency)
    return _built(name, family, num_classes, weight_quantizer, input_quantizer, activation)


def _built(
    name: str,
    family: str | None,
    num_classes: int | None,
    weights: WeightQuantizer,
    inputs: InputQuantizer | None,
    activation: str | None,
) -> Network:
    """A freshly initialized network; what is None is the architecture's own."""
    body, precision = name.rsplit("_", 1)
    family = family or next(f for f in FAMILIES if (f, body) in _ARCHITECTURES)
    architecture = _ARCHITECTURES[family, body]
    inputs = inputs or architecture.input_quantizer
    activation = activation or architecture.activation or biper_activation(name)
    classes = FAMILIES[family] if num_classes is None else num_classes
    real = (nn.Conv2d, nn.Linear) if precision == "32w32a" else (RealConv2d, RealLinear)
    conv = CONVOLUTIONS[precision](weights, inputs)
    network = _by(architecture.build, name, classes, Precision(conv, ACTIVATIONS[activation], *real))
    for _, layer in binary_layers(network):
        layer.weight_quantizer.start(layer.weight.detach())  # the network may have drawn other weights than the layer
    taken = describe(inputs) if precision == "1w1a" else None
    network.metadata = Metadata(name, family, classes, describe(weights), taken, activation)
    return network


def _by(build: Build, name: str, classes: int, precision: Precision) -> Network:
    """What an architecture's function builds. Raises UsageError for one of somebody's own that fails."""
    try:
        network: object = build(classes, precision)
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # whatever it may do
        raise UsageError(f"{name} cannot be built: {told(error)}") from error
    if not isinstance(network, Network):
        kind = type(network).__name__
        raise UsageError(f"{name}: {_path(build)} returns {kind}, which has to be derived from biper.models.Network")
    return network


@torch.no_grad()
def require_runs(network: Network, size: int) -> None:
    """Put an image of size x size through a network in evaluation mode, which it stays in.

    Raises UsageError for one of somebody's own that fails or gives no logits.
    """
    m = network.metadata
    try:
        logits: object = network.eval()(torch.zeros(1, 3, size, size))
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # whatever it may do
        raise UsageError(f"{m.model} fails on an image of {size}x{size}: {told(error)}") from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, m.num_classes):
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UsageError(f"{m.model} gives {got} for an image, not logits (1, {m.num_classes})")


def _require_sense(
    name: str,
    num_classes: int | None,
    freq: float | None,
    stage: int | None,
    weight_quantizer: WeightQuantizer | None,
    input_quantizer: InputQuantizer | None,
) -> None:
    """Raise UsageError for arguments of create_model that contradict each other or the model."""
    if weight_quantizer is not None and not (freq is None and stage is None):
        raise UsageError("weight_quantizer says how the weights become binary: leave freq and stage out")
    if input_quantizer is not None and not name.endswith("_1w1a"):
        raise UsageError(f"{name} has real activations: leave input_quantizer out")
    if weight_quantizer is not None and name.endswith("_32w32a"):
        raise UsageError(f"{name} has real weights: leave weight_quantizer out")
    if num_classes is not None and num_classes < 1:
        raise UsageError(f"num_classes is at least 1, not {num_classes}")
    if stage not in (None, 1, 2):
        raise UsageError(f"stage is 1 (real weights) or 2 (binary weights), not {stage!r}")


def network_like(m: Metadata) -> Network:
    """A freshly initialized network as metadata describe it. Raises UsageError for an unknown name."""
    inputs = None if m.input_quantizer is None else build_quantizer(m.input_quantizer, INPUT_QUANTIZERS)
    weights = None if m.model.endswith("_32w32a") else build_quantizer(m.weight_quantizer, WEIGHT_QUANTIZERS)
    network = create_model(
        m.model,
        family=m.family,
        num_classes=m.num_classes,
        weight_quantizer=weights,
        input_quantizer=inputs,
        activation=m.activation,
    )
    network.metadata = m
    return network
