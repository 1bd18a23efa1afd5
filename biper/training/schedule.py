"""Learning rate and tau as pure functions of the epoch, counted from 0; an epoch that is under way has a fraction."""

import math
from collections.abc import Sequence

CYCLES = ("onecycle", "triangular")  # which change from step to step
LR_TYPES = ("cos", "step", "linear", *CYCLES)
START, END = 1 / 25, 1 / 250_000  # of the cycles, as shares of lr


def lr_at(
    epoch: float,
    *,
    lr: float,
    epochs: int,
    lr_type: str = "cos",
    lr_decay_step: Sequence[int] = (),
    warm_up: bool = False,
    warm_up_epochs: int = 5,
    lr_peak: float = 0.25,
) -> float:
    """The learning rate of an epoch.

    Warm-up is lr*(epoch+1)/warm_up_epochs for the first warm_up_epochs. 'cos' then falls along half a cosine to 0 at
    `epochs`, 'linear' along a straight line; both start at the last epoch of the warm-up, where they equal lr. 'step'
    multiplies by 0.1 at each epoch of lr_decay_step. 'onecycle' rises from lr/25 to lr, which it reaches after the
    share lr_peak of the epochs, and falls to lr/250,000, both along half a cosine; 'triangular' does so along straight
    lines, the second of which ends at 0. Raises ValueError for another lr_type.
    [Smith and Topin 2017, Super-Convergence, arXiv 1708.07120]
    """
    if lr_type in CYCLES:
        rising = epoch < lr_peak * epochs
        share = epoch / (lr_peak * epochs) if rising else (epochs - epoch) / (epochs - lr_peak * epochs)
        if lr_type == "triangular":
            return lr * (START + (1 - START) * share if rising else share)
        low = START if rising else END
        return lr * (low + (1 - low) * (1 - math.cos(math.pi * share)) / 2)
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
