"""Quantizers and activations by the names that the flags have, as values."""

import inspect
from collections.abc import Mapping
from typing import Any

from biper.errors import UsageError
from biper.models.metadata import Metadata
from biper.nn.quantizers import INPUT_QUANTIZERS, WEIGHT_QUANTIZERS, InputQuantizer, Periodic, Sine, WeightQuantizer
from biper.nn.quantizers import build_quantizer as build

BIPER = "biper"
INPUTS = {
    BIPER: {"name": "polynomial_sign", "standardized": True},
    "bireal": {"name": "polynomial_sign", "standardized": False},
}


def weight_quantizer_named(name: str, freq: float) -> WeightQuantizer:
    """The quantizer of a method's first stage: biper, or one that is registered, which is given freq if it takes one.

    Raises UsageError for an unknown name.
    """
    if name == BIPER:
        return Sine(freq)
    kind = WEIGHT_QUANTIZERS.get(name)
    if kind is None:
        raise _unknown("--quantizer", name, (BIPER, *WEIGHT_QUANTIZERS))
    takes_freq = "freq" in inspect.signature(kind.__init__).parameters
    return build({"name": name, **({"freq": freq} if takes_freq else {})}, WEIGHT_QUANTIZERS)


def input_quantizer_named(name: str) -> InputQuantizer:
    """biper, bireal or one that is registered. Raises UsageError for an unknown name."""
    if name not in INPUTS and name not in INPUT_QUANTIZERS:
        raise _unknown("--input_quantizer", name, (*INPUTS, *INPUT_QUANTIZERS))
    return build(INPUTS.get(name, {"name": name}), INPUT_QUANTIZERS)


def own_methods() -> dict[str, bool]:
    """The registered weight quantizers beside BiPer's, by name, and whether they are binary from the start."""
    kinds = sorted(WEIGHT_QUANTIZERS.items())
    return {name: kind.binary for name, kind in kinds if not issubclass(kind, Periodic)}


def input_methods() -> list[str]:
    """The names of the input quantizers, BiPer's first."""
    others = {"bireal", *INPUT_QUANTIZERS} - {kind["name"] for kind in INPUTS.values()}
    return [BIPER, *sorted(others)]


def method_of(metadata: Metadata) -> dict[str, Any]:
    """The settings quantizer, input_quantizer and activation that a network was made with, by name."""
    weights = metadata.weight_quantizer["name"]
    kind = WEIGHT_QUANTIZERS.get(weights)
    inputs = metadata.input_quantizer
    return {
        "quantizer": BIPER if kind is not None and issubclass(kind, Periodic) else weights,
        "input_quantizer": "" if inputs is None else _input_name(inputs),
        "activation": metadata.activation,
    }


def _input_name(description: Mapping[str, Any]) -> str:
    return next((name for name, known in INPUTS.items() if known == description), str(description["name"]))


def _unknown(flag: str, name: str, names: tuple[str, ...]) -> UsageError:
    return UsageError(f"{flag} {name}: choose from {', '.join(sorted(names))}, or --import FILE.py that registers it")
