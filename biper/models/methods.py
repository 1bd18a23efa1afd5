"""Quantizers and activations by what the flags call them: a name, with settings behind it as in recu:tau_min=0.8."""

import ast
import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from biper.errors import UsageError, one_line
from biper.models.metadata import Metadata
from biper.models.registry import create_model
from biper.nn.quantizers import (
    INPUT_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    Description,
    InputQuantizer,
    Quantizer,
    Sine,
    SquareWave,
    WeightQuantizer,
    build_quantizer,
    describe,
)

BIPER = "biper"
INPUTS: Mapping[str, Description] = {
    BIPER: {"name": "polynomial_sign", "standardized": True},
    "bireal": {"name": "polynomial_sign", "standardized": False},
}


def weight_quantizer_named(text: str, freq: float) -> WeightQuantizer:
    """The quantizer of a method's first stage: biper, or one that is registered, which is given freq if it takes one.

    Raises UsageError for an unknown name or unfit settings.
    """
    name, settings = _parsed("--quantizer", text)
    if name == BIPER and not settings:
        return Sine(freq)
    choices = own_methods()
    if name not in choices:
        raise _unknown("--quantizer", name, (BIPER, *choices))
    if "freq" in _defaults(WEIGHT_QUANTIZERS[name]):
        settings = {"freq": freq, **settings}
    return build_quantizer({"name": name, **settings}, WEIGHT_QUANTIZERS)


def input_quantizer_named(text: str) -> InputQuantizer:
    """biper, bireal or one that is registered. Raises UsageError for an unknown name or unfit settings."""
    name, settings = _parsed("--input_quantizer", text)
    if name not in input_methods():
        raise _unknown("--input_quantizer", name, input_methods())
    return build_quantizer({**INPUTS.get(name, {"name": name}), **settings}, INPUT_QUANTIZERS)


def require_sound(text: str, freq: float) -> WeightQuantizer:
    """The quantizer of a method, tried on a few weights, in both of its stages if it has two.

    Raises UsageError, in one line, for one of somebody's own that fails or gives what no layer could use.
    """
    try:
        quantizer = weight_quantizer_named(text, freq)
        _try(quantizer)
        if quantizer.binarized() is not quantizer:
            _try(quantizer.binarized())
    except UsageError:
        raise
    except Exception as error:  # whatever somebody's own class may do
        text = f"--quantizer {text} fails on weights of shape (4, 3, 3, 3)"
        raise UsageError(f"{text}: {type(error).__name__}: {one_line(error)}") from error
    return quantizer


def _try(quantizer: WeightQuantizer) -> None:
    """Raise UsageError unless weights (4, 3, 3, 3) become finite ones of that shape, and -1 and +1 if it is binary."""
    kind, quantizer = type(quantizer).__name__, copy.deepcopy(quantizer)
    quantizer.fit((4, 1, 1, 1))
    w = torch.linspace(-0.1, 0.1, 108).view(4, 3, 3, 3)
    found, scale = quantizer(w), quantizer.scale(w)
    if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (w.shape, w.dtype):
        got = f"{tuple(found.shape)}, {found.dtype}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise UsageError(
            f"{kind}.forward(w) gives {got}: it has to be of w's shape and type, {tuple(w.shape)}, {w.dtype}"
        )
    if not bool(found.isfinite().all()):
        raise UsageError(f"{kind}.forward(w) gives numbers that are not finite")
    if scale is not None and scale.shape != (4, 1, 1, 1):
        raise UsageError(f"{kind}.scale(w) is {tuple(scale.shape)}: it has to be (C_out, 1, 1, 1), here (4, 1, 1, 1)")
    if quantizer.binary:
        quantizer.signs(w)


def own_methods() -> dict[str, bool]:
    """The registered weight quantizers beside BiPer's, by name, and whether they are binary from the start."""
    kinds = sorted(WEIGHT_QUANTIZERS.items())
    return {name: kind.binary for name, kind in kinds if kind not in (Sine, SquareWave)}


def input_methods() -> list[str]:
    """The names of the input quantizers, BiPer's first."""
    others = {"bireal", *INPUT_QUANTIZERS} - {str(known["name"]) for known in INPUTS.values()}
    return [BIPER, *sorted(others)]


def method_of(metadata: Metadata) -> dict[str, str]:
    """The settings quantizer, input_quantizer and activation with which such a network is made."""
    inputs = metadata.input_quantizer
    known = next((name for name, description in INPUTS.items() if description == inputs), "")
    weights = metadata.weight_quantizer
    return {
        "quantizer": BIPER if weights["name"] in (Sine.name, SquareWave.name) else _written(weights, WEIGHT_QUANTIZERS),
        "input_quantizer": known or ("" if inputs is None else _written(inputs, INPUT_QUANTIZERS)),
        "activation": metadata.activation,
    }


def method_of_model(name: str, family: str) -> dict[str, str]:
    """The settings of a model that is told nothing else."""
    with torch.device("meta"):
        return method_of(create_model(name, family=family).metadata)


def is_of_method(metadata: Metadata, setting: str, text: str) -> bool:
    """Whether a network is what a setting of its method, which is not empty, asks for; in either stage."""
    if setting == "activation":
        return text == metadata.activation
    if setting == "input_quantizer":
        return describe(input_quantizer_named(text)) == metadata.input_quantizer
    quantizer = weight_quantizer_named(text, metadata.freq or 1.0)
    return metadata.weight_quantizer in (describe(quantizer), describe(quantizer.binarized()))


def _parsed(flag: str, text: str) -> tuple[str, dict[str, Any]]:
    """The name, and the settings behind it."""
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"{flag} {text}: settings are written as in recu:tau_min=0.8,tau_max=0.95")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value
    return name, settings


def _written(description: Description, registry: Mapping[str, type[Quantizer]]) -> str:
    """The text of a description: its name, and the settings that are not the constructor's own."""
    name, defaults = str(description["name"]), {}
    if name in registry:
        defaults = _defaults(registry[name])
    others = [f"{k}={v!r}" for k, v in description.items() if k not in ("name", "freq") and defaults.get(k) != v]
    return f"{name}:{','.join(others)}" if others else name


def _defaults(kind: type[Quantizer]) -> dict[str, Any]:
    """The arguments of a constructor, by name, with what they are by default."""
    return {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items() if name != "self"}


def _unknown(flag: str, name: str, names: Iterable[str]) -> UsageError:
    return UsageError(f"{flag} {name}: choose from {', '.join(sorted(names))}, or --import FILE.py that registers it")
