"""What follows a batch norm: the activations of a network, by name, a module for each place.

The fast path of training (cpu/) and the instructions of packed networks know them, and the plain relu in torch's form.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RPReLU(nn.Module):
    """prelu(x - before) + after, per channel: (N, C, H, W), and so is what comes out.

    `before` and `after` (C, 1, 1) are learned, 0 at first, as is the slope of negative values, `weight` (C,), which is
    0.25 at first, as torch has it. The published code adds the negative of `before`.
    [Liu et al. 2020, ReActNet, arXiv 2003.03488, section 4.2]
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.zeros(channels, 1, 1))
        self.weight = nn.Parameter(torch.full((channels,), 0.25))
        self.after = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W)."""
        return F.prelu(x - self.before, self.weight) + self.after

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return str(len(self.weight))


ACTIVATIONS: Mapping[str, Callable[[int], nn.Module]] = {  # from the number of channels
    "hardtanh": lambda channels: nn.Hardtanh(),
    "relu": lambda channels: nn.ReLU(),
    "prelu": nn.PReLU,
    "rprelu": RPReLU,
}
