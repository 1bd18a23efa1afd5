"""Quantizers and activations by what the flags call them: a name, with settings behind it as in recu:tau_min=0.8."""

import ast
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from biper.errors import UsageError, shown, told
from biper.models.metadata import Metadata
from biper.models.registry import Network, create_model
from biper.nn import DEFAULT_FREQ, fitted
from biper.nn.fitted_quantizers import FittedSine, FittedSquareWave
from biper.nn.quantizers import (
    INPUT_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    Description,
    InputQuantizer,
    Q,
    Quantizer,
    Sine,
    SquareWave,
    WeightQuantizer,
    build_quantizer,
    describe,
)
from biper.nn.trials import try_input_quantizer, try_weight_quantizer

BIPER = "biper"
INPUTS: Mapping[str, Description] = {
    BIPER: {"name": "polynomial_sign", "standardized": True},
    "bireal": {"name": "polynomial_sign", "standardized": False},
}


def weight_quantizer_named(text: str, freq: float) -> WeightQuantizer:
    """The quantizer of a method's first stage: biper, or one that is registered, which is given freq if it takes one.

    biper:freq_scale=2 is BiPer with each layer's own frequency.

    Raises UsageError for an unknown name or unfit settings.
    """
    name, settings = _parsed("--quantizer", text)
    if name == BIPER:
        return build_quantizer({"name": FittedSine.name, **settings}, WEIGHT_QUANTIZERS) if settings else Sine(freq)
    choices = own_methods()
    if name not in choices:
        raise _unknown("--quantizer", name, (BIPER, *choices))
    _require_numbers("--quantizer", name, settings, WEIGHT_QUANTIZERS[name])
    if "freq" in _defaults(WEIGHT_QUANTIZERS[name]):
        settings = {"freq": freq, **settings}
    return build_quantizer({"name": name, **settings}, WEIGHT_QUANTIZERS)


def input_quantizer_named(text: str) -> InputQuantizer:
    """biper, bireal or one that is registered. Raises UsageError for an unknown name or unfit settings."""
    name, settings = _parsed("--input_quantizer", text)
    if name not in input_methods():
        raise _unknown("--input_quantizer", name, input_methods())
    known = INPUTS.get(name, {"name": name})
    _require_numbers("--input_quantizer", name, settings, INPUT_QUANTIZERS[str(known["name"])])
    return build_quantizer({**known, **settings}, INPUT_QUANTIZERS)


def require_sound(text: str, freq: float) -> WeightQuantizer:
    """The quantizer of a method, tried on a few weights, in both of its stages if it has two.

    Raises UsageError, in one line, for one of somebody's own that fails or gives what no layer could use.
    """
    quantizer = weight_quantizer_named(text, freq)
    for stage in (quantizer, quantizer.binarized()):
        _tried(f"--quantizer {text}", try_weight_quantizer, stage)
    return quantizer


def require_sound_inputs(text: str) -> InputQuantizer:
    """The input quantizer of a method, tried on a few activations. Raises UsageError as `require_sound`."""
    quantizer = input_quantizer_named(text)
    _tried(f"--input_quantizer {text}", try_input_quantizer, quantizer)
    return quantizer


def require_second_stage(text: str, quantizer: WeightQuantizer) -> None:
    """Raise UsageError for real weights of which nothing says how they become binary."""
    if not quantizer.binarized().binary:
        kind = type(quantizer).__name__
        raise UsageError(
            f"--quantizer {text}: {kind}.binary is False, and no binarized() says what comes after stage 1"
        )


def _tried(flag: str, trial: Callable[[Q], None], quantizer: Q) -> None:
    """What somebody's own class raises becomes a line with its place."""
    try:
        trial(quantizer)
    except UsageError as error:
        raise UsageError(f"{flag}: {error}") from error
    except Exception as error:  # whatever a class may do
        raise UsageError(f"{flag} fails when it is tried: {told(error)}") from error


def own_methods() -> list[str]:
    """The names of the registered weight quantizers beside BiPer's."""
    ours = (Sine, SquareWave, FittedSine, FittedSquareWave)  # but not what somebody derives from them
    return sorted(name for name, kind in WEIGHT_QUANTIZERS.items() if kind not in ours)


def input_methods() -> list[str]:
    """The names of the input quantizers, BiPer's first."""
    others = {"bireal", *INPUT_QUANTIZERS} - {str(known["name"]) for known in INPUTS.values()}
    return [BIPER, *sorted(others)]


def network_of_method(
    name: str,
    family: str | None,
    num_classes: int | None,
    *,
    stage: int = 1,
    freq: float = DEFAULT_FREQ,
    quantizer: str = BIPER,
    input_quantizer: str = "",
    activation: str = "",
) -> Network:
    """A fresh network of a model's name and a method, by what the flags call it, with the weights of a stage."""
    given: dict[str, Any] = {}
    if quantizer == BIPER:
        given |= {"freq": freq, "stage": stage}
    else:
        weights = weight_quantizer_named(quantizer, freq)
        given["weight_quantizer"] = weights.binarized() if stage == 2 else weights
    if input_quantizer:
        given["input_quantizer"] = input_quantizer_named(input_quantizer)
    return create_model(name, family=family, num_classes=num_classes, activation=activation or None, **given)


def method_of(metadata: Metadata) -> dict[str, str]:
    """The settings quantizer, input_quantizer and activation with which such a network is made."""
    inputs = metadata.input_quantizer
    known = next((name for name, description in INPUTS.items() if description == inputs), "")
    weights = metadata.weight_quantizer
    return {
        "quantizer": _written_weights(weights),
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


def _require_numbers(flag: str, name: str, settings: Mapping[str, Any], kind: type[Quantizer]) -> None:
    """Raise UsageError for a text where the constructor has a number by default, before the class meets it."""
    defaults = _defaults(kind)
    for key, value in settings.items():
        default = defaults.get(key)
        if isinstance(value, str) and isinstance(default, int | float) and not isinstance(default, bool):
            raise UsageError(f"{flag} {name}: {key} is a number such as {default}, not {shown(value)}")


def _written_weights(description: Description) -> str:
    """The text of a weight quantizer, of either stage."""
    if description["name"] in (Sine.name, SquareWave.name):
        return BIPER
    if description["name"] in (FittedSine.name, FittedSquareWave.name):
        return fitted(description["freq_scale"])
    return _written(description, WEIGHT_QUANTIZERS)


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
