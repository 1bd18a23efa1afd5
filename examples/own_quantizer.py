"""A weight quantizer of one's own: sign(w) whose surrogate is a tanh. docs/compare.md takes it to a packed file."""

import torch
from torch import Tensor

import biper


@biper.register_quantizer("tanh")
class Tanh(biper.WeightQuantizer):
    """sign(w) in {-1, +1} with sign(0) = +1; gradient that of tanh(steepness*w), steeper as training goes on."""

    steepness: Tensor

    def __init__(self, first: float = 2.0, last: float = 20.0) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.register_buffer("steepness", torch.tensor(first), persistent=False)

    def set_progress(self, progress: float) -> None:
        """Told before every step how much of the training is done, 0 to 1."""
        self.steepness.fill_(self.first + progress * (self.last - self.first))

    def forward(self, w: Tensor) -> Tensor:
        """w: (C_out, ...)."""
        surrogate = torch.tanh(self.steepness * w)
        return torch.where(w >= 0, 1.0, -1.0).to(w.dtype) + (surrogate - surrogate.detach())  # the difference is 0
