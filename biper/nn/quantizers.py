"""Quantizers: how a real weight, or an activation, becomes binary, and what gradient flows back.

A quantizer is a value: a small module that a layer takes as an argument and a file keeps as a name and its settings.
Whoever adds one writes one class: `@register_quantizer("name")`, a constructor whose arguments are kept as attributes
of the same names, and `forward`. One that changes over training has `set_progress`, which the trainer calls before each
step.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from biper.errors import UsageError, told
from biper.nn.functional import binary_sign, sine, square_wave, standardized_sign, straight_through_sign

Description = Mapping[str, Any]  # a quantizer in plain values: its name and its settings
Q = TypeVar("Q", bound="Quantizer")


class Quantizer(nn.Module):
    """Base of all quantizers. A layer keeps a copy of its own."""

    name: ClassVar[str] = ""  # in the registry

    def settings(self) -> dict[str, Any]:
        """What the constructor was given, by name: plain values."""
        return {name: getattr(self, name) for name in self._arguments()}

    @classmethod
    def _arguments(cls) -> list[str]:
        names = inspect.signature(cls.__init__).parameters
        return [name for name in names if name not in ("self", "args", "kwargs")]

    def set_progress(self, progress: float) -> None:
        """Told before every training step how much of the stage is done, 0 to 1, whether it was interrupted or not.

        Nothing changes here. One that does fills a buffer that is not persistent, in place, with what follows from it:
        so a network that is compiled or recorded is so once, and names in checkpoints stay what they are.
        """

    def fit(self, shape: tuple[int, ...]) -> None:
        """Told once, by the layer that takes a copy: the shape of a tensor with a number for each channel.

        It broadcasts over what the quantizer is given: over activations (C_in, 1, 1) in a convolution and (C_in,) in a
        linear layer, over weights (C_out, 1, ...). Nothing is made here. One that learns makes its parameters.
        """

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return ", ".join(f"{name}={getattr(self, name, '?')!r}" for name in self._arguments())


class WeightQuantizer(Quantizer):
    """From latent weights w (C_out, ...) to the ones that the layer convolves with, of the same shape, differentiable.

    binary: whether they are -1 and +1, so that the layer can be packed. The layer's sums are multiplied by `scale`.
    """

    binary: ClassVar[bool] = True

    def start(self, w: Tensor) -> None:
        """Told by who makes the network, before any training: the layer's fresh weights. Nothing changes here."""

    def scale(self, w: Tensor) -> Tensor | None:
        """(C_out, 1, ...), not negative: by what a channel's sums are multiplied, beside alpha; None stands for 1."""
        return None

    def effective(self, w: Tensor) -> Tensor:
        """The weights that the layer uses: those that it convolves with, times their scale."""
        weight: Tensor = self(w)
        scale = self.scale(w)
        return weight if scale is None else weight * scale

    def signs(self, w: Tensor) -> Tensor:
        """-1 and +1, what a packed file stores. Raises UsageError if the effective weights are real."""
        if not self.binary:
            raise UsageError(f"the weights of {type(self).__name__} are real: biper.binarize_(model) makes them binary")
        signs: Tensor = self(w)
        if not bool((signs.abs() == 1).all()):
            raise UsageError(
                f"{type(self).__name__} gives other weights than -1 and +1: binary = False says that they are real, "
                "and scale(w) what multiplies binary ones"
            )
        return signs

    def real(self, w: Tensor) -> Tensor:
        """The real weights that the binary ones stand for: the quantization error is measured between the two."""
        return w

    def binarized(self) -> "WeightQuantizer":
        """The quantizer of the second stage; a binary one stays as it is."""
        return self


class InputQuantizer(Quantizer):
    """From activations (N, ...) to -1 and +1 of the same shape, differentiable.

    In evaluation +1 where an activation is at least `threshold`, which broadcasts over it and is 0 where it is None.
    """

    threshold: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("threshold", None)


RESERVED = ("biper", "bireal")  # what the flags call quantizers with certain settings
WEIGHT_QUANTIZERS: dict[str, type[WeightQuantizer]] = {}
INPUT_QUANTIZERS: dict[str, type[InputQuantizer]] = {}


def register_quantizer(name: str) -> Callable[[type[Q]], type[Q]]:
    """Decorator: enters a quantizer's class in the registry of its kind, or both.

    Raises UsageError (a ValueError) if the name is taken.
    """

    if not isinstance(name, str):
        raise UsageError('a quantizer is registered under a name: write @register_quantizer("name")')
    if name in RESERVED:
        raise UsageError(f"{name} is what the flags call quantizers that are there: give yours another name")

    def enter(kind: type[Q]) -> type[Q]:
        if not (isinstance(kind, type) and issubclass(kind, WeightQuantizer | InputQuantizer)):
            raise UsageError(f"{kind!r} is no WeightQuantizer and no InputQuantizer: derive it from one of them")
        if not kind.__module__.startswith(f"{__package__}."):
            import_module("biper.nn.layers")  # where all of ours are registered: they have their names first
        registries: dict[type[Any], dict[str, Any]] = {
            WeightQuantizer: WEIGHT_QUANTIZERS,
            InputQuantizer: INPUT_QUANTIZERS,
        }
        fitting = [registry for base, registry in registries.items() if issubclass(kind, base)]
        for registry in fitting:
            if name in registry and _path(registry[name]) != _path(kind):  # a notebook's cell may run again
                raise UsageError(f"there is a quantizer {name!r} already: {registry[name].__qualname__}")
        for registry in fitting:
            registry[name] = kind
        kind.name = name
        return kind

    return enter


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def positive(name: str, value: float, unit: str = "") -> float:
    """The value. Raises UsageError unless it is a positive, finite number."""
    try:
        number = math.fsum([value])  # NumPy's numbers too, but no text
        fits = number > 0 and math.isfinite(number)
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise UsageError(f"{name} is a positive number{unit}, not {value!r}")
    return number


class Periodic(WeightQuantizer):
    """Base of BiPer's two stages. freq in radians per unit weight. Raises UsageError unless it is positive."""

    def __init__(self, freq: float) -> None:
        super().__init__()
        self.freq = positive("freq", freq, " of radians per unit weight")

    def real(self, w: Tensor) -> Tensor:
        """sin(freq*w)."""
        return sine(w, self.freq)


@register_quantizer("sine")
class Sine(Periodic):
    """sin(freq*w) in [-1, 1]; gradient freq*cos(freq*w). BiPer's stage 1. [BiPer, weight binarization]"""

    binary = False

    def forward(self, w: Tensor) -> Tensor:
        """Any shape, and so is what comes out."""
        return sine(w, self.freq)

    def binarized(self) -> "SquareWave":
        """The square wave of the same period."""
        return SquareWave(self.freq)


@register_quantizer("square_wave")
class SquareWave(Periodic):
    """sign(sin(freq*w)) in {-1, +1}; gradient freq*cos(freq*w), that of the sine. BiPer's stage 2.

    [BiPer, weight binarization]
    """

    def forward(self, w: Tensor) -> Tensor:
        """Any shape, and so is what comes out."""
        return square_wave(w, self.freq)


@register_quantizer("sign")
class Sign(WeightQuantizer, InputQuantizer):
    """sign(x) in {-1, +1} with sign(0) = +1, of weights or activations; gradient 1 where |x| <= 1, else 0.

    The straight-through estimator of the clipped identity.
    [Courbariaux et al. 2016, Binarized Neural Networks, arXiv 1602.02830]
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, and so is what comes out."""
        return straight_through_sign(x)


@register_quantizer("polynomial_sign")
class PolynomialSign(InputQuantizer):
    """sign(a); gradient max(0, 2 - 2*|x|), at x = a / sqrt(var(a) + 1e-5) in training if standardized, else at a.

    The unbiased variance is that of a sample. Standardized it is BiPer's, without it Bi-Real Net's.
    [BiPer, activation binarization; Liu et al. 2018, Bi-Real Net, arXiv 1808.00278, section 3.3]
    """

    def __init__(self, standardized: bool = True) -> None:
        super().__init__()
        self.standardized = standardized

    def forward(self, a: Tensor) -> Tensor:
        """a: (N, ...)."""
        return standardized_sign(a) if self.standardized and self.training else binary_sign(a)


def describe(quantizer: Quantizer) -> dict[str, Any]:
    """A quantizer in plain values, as files keep it: `build_quantizer` makes it again. Raises UsageError if it can't.

    It can if its class is registered and its constructor's arguments are attributes of the same names.
    """
    kind = type(quantizer)
    if "name" not in vars(kind) or not kind.name:
        raise UsageError(
            f"{kind.__name__} is not registered, so no file could name it: decorate it with @register_quantizer"
        )
    try:
        settings = quantizer.settings()
    except AttributeError as error:
        raise UsageError(f"{kind.__name__} does not keep an argument of its constructor: {error}") from error
    for name, value in settings.items():
        if not isinstance(value, str | int | float | bool | None):
            raise UsageError(
                f"{kind.__name__}: {name} is {type(value).__name__}, which no file keeps: use plain values"
            )
    return {"name": kind.name, **settings}


def build_quantizer(description: Description, registry: Mapping[str, type[Q]]) -> Q:
    """The quantizer that a description of `describe` means. Raises UsageError for an unknown name or unfit settings."""
    settings = dict(description)
    name = settings.pop("name", None)
    if not isinstance(name, str) or name not in registry:
        own = "one of your own has to be imported first: --import FILE.py"
        raise UsageError(f"unknown quantizer {name!r}; choose from {', '.join(sorted(registry))}; {own}")
    kind = registry[name]
    if unknown := set(settings) - set(kind._arguments()):
        known = ", ".join(kind._arguments()) or "none"
        raise UsageError(f"the quantizer {name!r} has no setting {min(unknown)!r}; its settings are {known}")
    try:
        return kind(**settings)
    except UsageError:
        raise
    except Exception as error:  # whatever a constructor of somebody's own may raise
        raise UsageError(f"the quantizer {name!r} cannot be made of {settings}: {told(error)}") from error


def changes_over_training(model: nn.Module) -> bool:
    """Whether a quantizer of a model's layers heeds how much of the training is done."""
    quantizers = (type(module) for module in model.modules() if isinstance(module, Quantizer))
    return any(kind.set_progress is not Quantizer.set_progress for kind in quantizers)


def set_progress(model: nn.Module, progress: float) -> None:
    """Tell the quantizers of a model's layers how much of the training is done, 0 to 1."""
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.set_progress(progress)
