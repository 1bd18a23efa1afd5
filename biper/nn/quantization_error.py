"""How far the real weights are from the binary ones that stand for them: BiPer's sin(freq*w) from its sign.

Other quantizers make other weights binary: latent, standardized or clamped ones. Theirs is the error of those.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from biper.files import write_rows
from biper.nn.layers import binary_layers
from biper.nn.quantizers import Periodic, WeightQuantizer


@dataclass(frozen=True)
class LayerError:
    """One binarized layer, with w its latent weights and s the real ones that its quantizer makes binary: sin(freq*w).

    l1: mean(|s - e|), the published error, of the weights e that take their place: sign(s), times the quantizer's scale
    if it has one; scale: g = mean(|s|), the best one; squared: mean((s - g*sign(s))^2);
    mean_abs: mean(|w|); freq_std: freq*std(w); past_quarter: share of |w| > pi/(2*freq), past which the surrogate's
    gradient has the other sign; freq: that of the layer. These three are not numbers without a freq.
    """

    name: str
    weights: int
    l1: float
    squared: float
    scale: float
    mean_abs: float
    freq_std: float
    past_quarter: float
    freq: float


@dataclass(frozen=True)
class QuantizationError:
    """The errors of all binarized layers, and the two sums that the published script reports."""

    layers: tuple[LayerError, ...]

    @property
    def qe(self) -> float:
        """Sum over the layers of mean(|sin(freq*w) - sign(sin(freq*w))|)."""
        return sum(layer.l1 for layer in self.layers)

    @property
    def squared(self) -> float:
        """Sum over the layers of the squared error with the best scale."""
        return sum(layer.squared for layer in self.layers)

    @property
    def relative(self) -> float:
        """Mean over the layers of the squared error with the best scale, as a share of mean(s^2): without a unit.

        Not a number without layers.
        """
        shares = [layer.squared / (layer.squared + layer.scale**2) for layer in self.layers]
        return sum(shares) / len(shares) if shares else math.nan

    @property
    def b(self) -> float:
        """Sum over the layers of mean(|w|)."""
        return sum(layer.mean_abs for layer in self.layers)


def layer_error(name: str, w: Tensor, quantizer: WeightQuantizer) -> LayerError:
    """The errors of one layer's latent weights w, any shape, under its quantizer, in either stage."""
    real, binary = quantizer.real(w), quantizer.binarized()
    signs, effective = binary.signs(w), binary.effective(w)
    freq = quantizer.freq if isinstance(quantizer, Periodic) else math.nan
    scale = real.abs().mean()
    values = torch.stack(
        [
            (real - effective).abs().mean(),
            (real - scale * signs).square().mean(),
            scale,
            w.abs().mean(),
            freq * w.std(),
            (w.abs() > math.pi / (2 * freq)).float().mean() if math.isfinite(freq) else w.new_tensor(freq),
        ]
    )
    return LayerError(name, w.numel(), *[*values.tolist(), freq])


@torch.no_grad()
def quantization_error(model: nn.Module) -> QuantizationError:
    """The quantization error of a model's binarized layers, in either stage. [BiPer, quantization error]"""
    return QuantizationError(
        tuple(layer_error(n, layer.weight, layer.weight_quantizer) for n, layer in binary_layers(model))
    )


def own_frequencies(model: nn.Module) -> dict[str, float]:
    """The frequency of each layer by its name, in radians per unit weight; empty where all have one or none."""
    quantizers = {name: layer.weight_quantizer for name, layer in binary_layers(model)}
    freqs = {name: q.freq for name, q in quantizers.items() if isinstance(q, Periodic)}
    return freqs if len(set(freqs.values())) > 1 else {}


def format_table(error: QuantizationError) -> str:
    """The table that people read: a line a layer, then the published sums."""
    titles = ("layer", "weights", "L1", "squared", "scale g", "mean|w|", "freq*std", "past quarter", "freq")
    lines = ["{:<16}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>14}{:>10}".format(*titles)]
    for layer in error.layers:
        name, weights, *values, past, freq = astuple(layer)
        numbers = "".join(f"{_number(value, '.4f'):>10}" for value in values)
        lines.append(f"{name:<16}{weights:>10}{numbers}{_number(past, '.2%'):>14}{_number(freq, '.4g'):>10}")
    return "\n".join([*lines, f"QE = {error.qe:.6f}   b = {error.b:.6f}"])


def _number(value: float, digits: str) -> str:
    """A number as the table has it; those of a freq are missing where there is none."""
    return "-" if math.isnan(value) else format(value, digits)


def write_csv(errors: Sequence[tuple[str, QuantizationError]], path: Path) -> None:
    """One row a layer and checkpoint, (name of the checkpoint, its error), with full precision."""
    write_rows([{"checkpoint": name, **asdict(layer)} for name, error in errors for layer in error.layers], path)


def is_table(path: Path) -> bool:
    """Whether a file is a table of `write_csv`, by its first line."""
    with path.open("rb") as file:
        return file.readline(1000).startswith(b"checkpoint,name,weights,l1,squared,")
