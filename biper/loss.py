"""The periodic regularizer, which training adds to the cross-entropy. Evaluation's loss is the cross-entropy alone."""

import torch
from torch import Tensor, nn

from biper.binarize import sine
from biper.layers import binary_layers


def periodic_regularizer(model: nn.Module, tau: float) -> Tensor:
    """tau * sum over the binarized layers of mean(sin(freq*w)**2): a scalar on the model's device.

    It pulls sin(freq*w) towards 0, an L2 penalty on the effective weight, in both stages. Zero for a network without
    binarized layers. [BiPer's published code]
    """
    penalties = [sine(layer.weight, layer.freq).square().mean() for _, layer in binary_layers(model)]
    if not penalties:
        return torch.zeros((), device=next(model.parameters()).device)
    return tau * torch.stack(penalties).sum()
