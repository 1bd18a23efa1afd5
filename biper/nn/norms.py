"""A batch norm of running statistics as one product and one sum."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = nn.BatchNorm1d | nn.BatchNorm2d


def fold_norm(norm: Norm) -> tuple[Tensor, Tensor]:
    """A batch norm of running statistics as x * gain + shift, (C,) each, with the bits that torch computes with."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    # rounded as a scalar's root and quotient are: torch.sqrt of a float32 vector may be off in the last bit
    root = (variance + norm.eps).double().sqrt().to(variance.dtype)
    gain = (1 / root.double()).to(variance.dtype)
    shift = F.batch_norm(torch.zeros_like(mean)[None], mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)
    return gain if norm.weight is None else gain * norm.weight, shift[0]
