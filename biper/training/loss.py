"""The loss of training: the sum of its terms, each with a weight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biper.nn.losses import Regularizer, periodic_regularizer


@dataclass(frozen=True)
class LossTerm:
    """A term of the loss: value(model, images, logits, labels) is a scalar, differentiable in the parameters.

    images: (B, 3, H, W); logits: (B, classes); labels: (B,), or of mixed images (B, classes) probabilities. A term that
    is a mean over the batch's images is weighted by what this process's share of the batch counts among all processes;
    one of the parameters alone, with of_images=False, is not. weight: by what it counts in the gradient; the metrics
    have the value itself.
    """

    value: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    of_images: bool = True
    weight: float = 1.0


def make_loss_terms(
    tau: float,
    regularizer: Regularizer = periodic_regularizer,
    *,
    label_smoothing: float = 0.0,
    teacher: LossTerm | None = None,
) -> dict[str, LossTerm]:
    """The paper's loss: cross-entropy, called `loss`, plus the periodic regularizer, whose weight is tau (0: none).

    A term that is added here, as that of a teacher, enters the gradient, and as train_<name> the metrics.
    regularizer: nn.losses.periodic_regularizer or its equal; teacher: its term, whose weight the cross-entropy lacks.
    """

    def cross_entropy(_model: nn.Module, _images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    def penalty(model: nn.Module, _images: Tensor, logits: Tensor, _labels: Tensor) -> Tensor:
        return regularizer(model, tau) if tau else logits.new_zeros(())

    terms = {
        "loss": LossTerm(cross_entropy, weight=1.0 - teacher.weight if teacher else 1.0),
        "regularizer": LossTerm(penalty, of_images=False),
    }
    return terms | ({"distillation": teacher} if teacher else {})


def add_up(terms: Mapping[str, LossTerm], values: Mapping[str, Tensor], weight: float) -> Tensor:
    """The loss of a step from the values of its terms; weight: that of this process's images."""
    shares = {name: term.weight * (weight if term.of_images else 1.0) for name, term in terms.items()}
    first, *others = (values[name] * share if share != 1 else values[name] for name, share in shares.items())
    for value in others:
        first = torch.add(first, value)
    return first
