"""Learning rate and tau as pure functions of the epoch, counted from 0."""

import math
from collections.abc import Sequence

LR_TYPES = ("cos", "step", "linear")


def lr_at(
    epoch: int,
    *,
    lr: float,
    epochs: int,
    lr_type: str = "cos",
    lr_decay_step: Sequence[int] = (),
    warm_up: bool = False,
    warm_up_epochs: int = 5,
) -> float:
    """The learning rate of an epoch.

    Warm-up is lr*(epoch+1)/warm_up_epochs for the first warm_up_epochs. 'cos' then falls along half a cosine to 0 at
    `epochs`, 'linear' along a straight line; both start at the last epoch of the warm-up, where they equal lr. 'step'
    multiplies by 0.1 at each epoch of lr_decay_step. Raises ValueError for another lr_type.
    """
    if warm_up and epoch < warm_up_epochs:
        return lr * (epoch + 1) / warm_up_epochs
    start = warm_up_epochs - 1 if warm_up else 0
    if lr_type == "step":
        return lr * 0.1 ** sum(epoch >= step for step in lr_decay_step)
    fraction = (epoch - start) / (epochs - start)
    if lr_type == "cos":
        return lr / 2 * (1 + math.cos(math.pi * fraction))
    if lr_type == "linear":
        return lr * (1 - fraction)
    raise ValueError(f"unknown lr_type {lr_type!r}; choose from {', '.join(LR_TYPES)}")


def tau_at(epoch: int, *, epochs: int, tau_min: float, tau_max: float) -> float:
    """The regularizer's weight in an epoch: A*exp(epoch/epochs) + B, from tau_min at 0 to tau_max at `epochs`."""
    slope = (tau_max - tau_min) / (math.e - 1)
    return slope * math.exp(epoch / epochs) + tau_min - slope
