"""How a network is run fast: memory layout, number format, and fused kernels or the compiler."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from biper.cpu.rewriting import fuse, fused_regularizer
from biper.errors import CompilerMissing
from biper.nn.losses import periodic_regularizer
from biper.training.compilation import CompiledNetwork

log = logging.getLogger("biper")
Forward = Callable[[Tensor], Tensor]  # images (N, 3, H, W) to logits (N, classes)
PAYS = 1000  # steps: torch.compile takes as long as about that many steps save
BF16_UNITS = ("amx_bf16", "avx512_bf16")  # of processors, as Linux names them


def chosen_amp(amp: str, device: torch.device) -> str:
    """off or bf16: auto is bf16 where the device computes with it faster than with float32."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "off"
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "off"
    return "bf16" if any(unit in facts for unit in BF16_UNITS) else "off"


class Accelerated(nn.Module):
    """A network as it is run: channels-last; in training under autocast; through `fast` where that is its equal.

    The parameters are the network's own, and `regularizer(model, tau)` is nn.losses.periodic_regularizer's equal.
    """

    def __init__(self, network: nn.Module, amp: bool) -> None:
        super().__init__()
        self.network, self.amp = network, amp
        self.fast: Forward | None = None
        self.how = "plain torch"
        self.regularizer = periodic_regularizer

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) -> logits (N, classes), float32."""
        images = images.contiguous(memory_format=torch.channels_last)
        training = bool(self.network.training)
        fast = self.fast if len(images) and (training or not torch.is_grad_enabled()) else None
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp and training):
            logits = fast(images) if fast else self.network(images)
        return logits if logits.dtype == torch.float64 else logits.float()

    def describe(self) -> str:
        """How it computes, in a few words."""
        return f"{'bf16' if self.amp else 'float32'}, {self.how}"


def accelerate(network: nn.Module, device: torch.device, *, amp: bool, compiled: bool, steps: int) -> Accelerated:
    """The network on its device, ready to run `steps` steps or more.

    compiled: with fused kernels on the CPU, with torch.compile on a GPU if the steps pay for it. Where no compiler
    works, one line says so and it goes on without.
    """
    accelerated = Accelerated(network.to(device).to(memory_format=torch.channels_last), amp)
    if not compiled or any(p.dtype != torch.float32 for p in network.parameters()):
        return accelerated
    if device.type == "cuda":
        if steps >= PAYS:
            accelerated.fast, accelerated.how = CompiledNetwork(network), "torch.compile"
        return accelerated
    try:
        accelerated.fast, accelerated.how = fuse(network), "fused kernels"
        accelerated.regularizer = fused_regularizer
    except CompilerMissing as error:
        log.warning("no fused kernels, so this is slower, and other in the last digits: %s", error)
    return accelerated
