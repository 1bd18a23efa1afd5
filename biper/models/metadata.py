"""What a network must know of itself to be rebuilt, fed and read: saved with it, and never guessed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from biper.errors import UsageError, shown
from biper.kinds import require
from biper.models.fields import METADATA
from biper.nn.quantizers import WEIGHT_QUANTIZERS, Description, PolynomialSign, Sine, SquareWave, describe

REAL_INPUTS = ("_1w32a", "_32w32a")  # models whose layers take real activations


@dataclass(frozen=True)
class Metadata:
    """The identity of a network and of the data that it was trained on.

    weight_quantizer, input_quantizer: of its binary layers, by name and settings; input_quantizer is None where the
    activations are real; activation: the name of what follows the batch norms. mean and std per channel for images in
    [0, 1]; classes in the order of the logits, class_names the same in words. The fields of the data are empty on a
    network fresh from `create_model`.
    """

    model: str
    family: str
    num_classes: int
    weight_quantizer: Description
    input_quantizer: Description | None
    activation: str
    dataset: str = ""
    classes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    image_size: int | None = None

    @property
    def freq(self) -> float | None:
        """The frequency in radians per unit weight; None for weights that no periodic function makes binary."""
        return self.weight_quantizer.get("freq")

    @property
    def stage(self) -> int:
        """1 if the weights are real, 2 if they are binary. Raises UsageError for a quantizer that is not registered."""
        name = self.weight_quantizer["name"]
        if name not in WEIGHT_QUANTIZERS:
            raise UsageError(f"unknown quantizer {name!r}: --import FILE.py that registers it")
        return 2 if WEIGHT_QUANTIZERS[name].binary else 1

    @property
    def quantizer_text(self) -> str:
        """The quantizers as a log has them; of inputs and of the activation what BiPer does not have."""
        parts = [_text(self.weight_quantizer) if self.freq is None else f"freq {self.freq:g}"]
        if self.input_quantizer is not None and self.input_quantizer != describe(PolynomialSign()):
            parts.append(f"inputs {_text(self.input_quantizer)}")
        if self.activation != biper_activation(self.model):
            parts.append(f"activation {self.activation}")
        return ", ".join(parts)

    @property
    def shown_size(self) -> int:
        """The side of the images that it is shown; its family's if it has not been trained."""
        return self.image_size or (224 if self.family == "imagenet" else 32)

    def to_plain(self) -> dict[str, Any]:
        """As plain values, which a file may hold."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def to_biper(self) -> dict[str, Any] | None:
        """As plain values with freq and stage in the quantizers' place, as every release reads them.

        None where the quantizers or the activation are not BiPer's own.
        """
        values = self.to_plain()
        pair = values.pop("weight_quantizer"), values.pop("input_quantizer")
        if self.freq is None or pair != biper_quantizers(self.model, self.freq, self.stage):
            return None
        if values.pop("activation") != biper_activation(self.model):
            return None
        values["freq"], values["stage"] = self.freq, self.stage
        first = ("model", "family", "num_classes", "freq", "stage")
        return {name: values[name] for name in (*first, *(n for n in values if n not in first))}


def _text(description: Description) -> str:
    """A quantizer's name, with its settings behind it."""
    settings = ", ".join(f"{key} {value}" for key, value in description.items() if key != "name")
    return f"{description['name']} ({settings})" if settings else str(description["name"])


def biper_quantizers(model: str, freq: float, stage: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """BiPer's quantizers of weights and inputs for a model's precision, in a stage."""
    weights = Sine(freq) if stage == 1 else SquareWave(freq)
    return describe(weights), None if model.endswith(REAL_INPUTS) else describe(PolynomialSign())


def biper_activation(model: str) -> str:
    """What follows the batch norms of the published networks."""
    return "relu" if model.endswith("_1w32a") else "hardtanh"


def metadata_from(saved: Mapping[str, Any]) -> Metadata:
    """The metadata of `to_plain` or, as older files have them, with freq and stage in place of the quantizers.

    Those had the published activations alone. Raises UsageError for others: for what is missing or not known, not of
    its kind in `fields.METADATA`, or contradicts the rest.
    """
    if unknown := [name for name in saved if name not in METADATA]:
        raise UsageError(f"its metadata have {shown(unknown[0])}, which is not known here")
    older = "freq" in saved or "stage" in saved
    pair = ("freq", "stage") if older else ("weight_quantizer", "input_quantizer")
    require(saved, METADATA, ("model", "family", "num_classes", *pair))
    values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in saved.items()}
    if older:
        quantizers = biper_quantizers(values["model"], values.pop("freq"), values.pop("stage"))
        values["weight_quantizer"], values["input_quantizer"] = quantizers
    values.setdefault("activation", biper_activation(values["model"]))
    m = Metadata(**values)
    if not {len(m.classes), len(m.class_names)} <= {0, m.num_classes} or (m.std and len(m.mean) != len(m.std)):
        raise UsageError("its metadata contradict themselves: as many classes as names of them, a std for each mean")
    return m
