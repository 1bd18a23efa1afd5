"""The periodic regularizer, which training adds to the cross-entropy. Evaluation's loss is the cross-entropy alone."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from biper.nn.layers import BinaryLayer, binary_layers
from biper.nn.quantizers import Periodic

Regularizer = Callable[[nn.Module, float], Tensor]


def periodic_layers(model: nn.Module) -> tuple[list[BinaryLayer], list[float]]:
    """The layers whose quantizer is BiPer's, of either stage, and their frequencies."""
    layers = [layer for _, layer in binary_layers(model) if isinstance(layer.weight_quantizer, Periodic)]
    return layers, [q.freq for layer in layers if isinstance(q := layer.weight_quantizer, Periodic)]


def periodic_regularizer(model: nn.Module, tau: float) -> Tensor:
    """tau * sum over the binarized layers of mean(sin(freq*w)**2): a scalar on the model's device.

    It pulls sin(freq*w) towards 0, an L2 penalty on the effective weight, in both stages. Only layers with a periodic
    quantizer count; zero without one. [BiPer's published code]
    """
    layers, freqs = periodic_layers(model)
    if not layers:
        parameter = next(model.parameters(), torch.empty(0))
        return torch.zeros((), device=parameter.device)
    # all layers at once, as torch's optimizers do it: on a GPU a few kernels, however many layers there are
    angles = torch._foreach_mul([layer.weight for layer in layers], freqs)
    norms = torch._foreach_norm(torch._foreach_sin(angles))
    roots = torch._foreach_mul(norms, [max(1, layer.weight.numel()) ** -0.5 for layer in layers])
    return tau * torch.stack(roots).square().sum()


def opposite(regularizer: Regularizer) -> Regularizer:
    """tau * sum over the binarized layers of mean(cos(freq*w)**2), from periodic_regularizer or its equal.

    It pulls sin(freq*w) towards -1 and +1. Not of the paper: for comparison. As sin**2 + cos**2 = 1, it is what the
    other leaves of one a layer.
    """

    def complement(model: nn.Module, tau: float) -> Tensor:
        return tau * len(periodic_layers(model)[0]) - regularizer(model, tau)

    return complement
