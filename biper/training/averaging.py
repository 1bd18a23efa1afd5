"""Exponential moving averages of what may be averaged: real parameters and batch norm's statistics."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from biper.errors import UsageError
from biper.nn.layers import binary_layers


def averaged(network: nn.Module) -> dict[str, Tensor]:
    """The real tensors of a state_dict that may be averaged, by name, each once; they share the network's memory.

    These are all but the weights that become binary and what belongs to their quantizers: the sign of a mean weight is
    that of no network that was trained. A layer's alpha and bias are real parameters like others.
    """
    layers = [layer.state_dict() for _, layer in binary_layers(network)]
    own = {tensor.data_ptr() for entries in layers for name, tensor in entries.items() if name not in ("alpha", "bias")}
    chosen: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and tensor.data_ptr() not in own:
            chosen.setdefault(tensor.data_ptr(), (name, tensor))
    return dict(chosen.values())


class MovingAverage:
    """The averages of a network under training: after each step decay times what they were, plus the rest of what is.

    In the first steps less than `decay` counts, (1 + step) / (10 + step), so that the initial values are soon
    forgotten. [Tarvainen and Valpola 2017, Mean teachers, arXiv 1703.01780]
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        live = averaged(network)
        self.decay, self.names, self.live = decay, list(live), list(live.values())
        self.averages = [tensor.clone() for tensor in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After a step of the whole training, counted from 1."""
        torch._foreach_lerp_(self.averages, self.live, 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Context: the network is the average. What is changed of it in the context is changed of the average."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for live, average in zip(self.live, self.averages, strict=True):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)

    def hidden(self) -> dict[str, Tensor]:
        """Inside `shown` what training goes on from, by name; outside of it the averages."""
        return dict(zip(self.names, self.averages, strict=True))

    @torch.no_grad()
    def go_on_from(self, live: Mapping[str, Tensor]) -> None:
        """Take the network as it is for the average, and give it what `hidden` said inside `shown`.

        Raises UsageError for what is not of this network, or not finite.
        """
        for name, tensor in zip(self.names, self.live, strict=True):
            if name not in live or live[name].shape != tensor.shape or not bool(live[name].isfinite().all()):
                raise UsageError(f"what is not averaged of {name} is missing, of another shape, or not finite")
        for name, tensor, average in zip(self.names, self.live, self.averages, strict=True):
            average.copy_(tensor)
            tensor.copy_(live[name])
