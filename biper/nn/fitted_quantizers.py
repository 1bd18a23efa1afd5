"""BiPer with a frequency for each layer, which fits its fresh weights. Not of the paper.

Fresh weights are the narrower the more inputs a layer has, so that one frequency takes those of some layers past the
first quarter of a period, where the gradient changes its sign, and leaves others close to 0.
"""

import math
from typing import Any

import torch
from torch import Tensor

from biper.nn.functional import sine, square_wave
from biper.nn.quantizers import Periodic, WeightQuantizer, positive, register_quantizer


class Fitted(Periodic):
    """Base of both stages: freq = freq_scale / std(w) of the layer's fresh weights w, kept beside them in a buffer."""

    frequency: Tensor  # a scalar

    def __init__(self, freq_scale: float = 2.0) -> None:
        WeightQuantizer.__init__(self)
        self.freq_scale = positive("freq_scale", freq_scale)
        self.register_buffer("frequency", torch.tensor(math.nan))
        self._freq: float | None = None  # the buffer's value, so that a step need not wait for its device

    @torch.no_grad()
    def start(self, w: Tensor) -> None:
        """Take the frequency from the layer's fresh weights. Raises UsageError if they are all equal."""
        if not w.is_meta:
            self.frequency.fill_(self.freq_scale / positive("the spread of fresh weights", w.float().std().item()))
            self._freq = None

    @property
    def freq(self) -> float:  # type: ignore[override]  # in the others it is given
        """In radians per unit weight; not a number before there are weights."""
        if self._freq is None:
            self._freq = math.nan if self.frequency.is_meta else self.frequency.item()
        return self._freq

    def _apply(self, *args: Any, **options: Any) -> "Fitted":  # noqa: ANN401
        before = self.frequency.dtype
        super()._apply(*args, **options)  # type: ignore[no-untyped-call]
        if self.frequency.dtype != before:  # which rounds it
            self._freq = None
        return self

    def _load_from_state_dict(self, *args: Any) -> None:  # noqa: ANN401
        super()._load_from_state_dict(*args)
        self._freq = None


@register_quantizer("fitted_sine")
class FittedSine(Fitted):
    """sin(freq*w), BiPer's stage 1, with the layer's own freq = freq_scale / std(fresh w)."""

    binary = False

    def forward(self, w: Tensor) -> Tensor:
        """Any shape, and so is what comes out."""
        return sine(w, self.freq)

    def binarized(self) -> "FittedSquareWave":
        """The square wave of the same period."""
        quantizer = FittedSquareWave(self.freq_scale)
        quantizer.frequency = self.frequency.clone()
        return quantizer


@register_quantizer("fitted_square_wave")
class FittedSquareWave(Fitted):
    """sign(sin(freq*w)), BiPer's stage 2, with the layer's own freq."""

    def forward(self, w: Tensor) -> Tensor:
        """Any shape, and so is what comes out."""
        return square_wave(w, self.freq)
