"""The layers: convolutions with binary weights and, unless told otherwise, activations; and those that stay real."""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from biper.binarize import binary_sign, sine, square_wave, standardized_sign
from biper.errors import UsageError


class BinaryConv2d(nn.Conv2d):
    """conv2d(binary_sign(a), effective weight) * alpha.

    Stage 1's effective weight is sin(freq*w), stage 2's the square wave of the same period. `weight` holds the latent
    weight w, (C_out, C_in/groups, k, k); `alpha` (C_out, 1, 1) is learned, initialized U(0, 1). Zero padding stays
    zero: it is no binary value. Raises UsageError (a ValueError) unless stage is 1 or 2 and freq is positive.
    [BiPer, arXiv 2404.01278]
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        *,
        dilation: int = 1,
        bias: bool = False,
        freq: float = 20.0,
        stage: int = 1,
        binary_activations: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        if stage not in (1, 2):
            raise UsageError(f"stage is 1 (real weights) or 2 (binary weights), not {stage!r}")
        if not (freq > 0 and math.isfinite(freq)):
            raise UsageError(f"freq is a positive number of radians per unit weight, not {freq!r}")
        self.freq = freq
        self.stage = stage
        self.binary_activations = binary_activations
        self.alpha = nn.Parameter(torch.rand(out_channels, 1, 1))

    def effective_weight(self) -> Tensor:
        """The weight that the convolution uses, of the shape of `weight`."""
        return sine(self.weight, self.freq) if self.stage == 1 else square_wave(self.weight, self.freq)

    def forward(self, a: Tensor) -> Tensor:
        """a: (N, C_in, H, W) -> (N, C_out, H', W')."""
        if self.binary_activations:
            a = standardized_sign(a) if self.training else binary_sign(a)
        sums = F.conv2d(a, self.effective_weight(), None, self.stride, self.padding, self.dilation, self.groups)
        scaled = sums * self.alpha  # (C_out, 1, 1), broadcasts over (N, C_out, H', W')
        return scaled if self.bias is None else scaled + self.bias[:, None, None]

    def extra_repr(self) -> str:
        """What print(model) shows."""
        shape = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        how = f"padding={self.padding}, groups={self.groups}, binary_activations={self.binary_activations}"
        return f"{shape}, {how}, freq={self.freq}, stage={self.stage}"


class _RealConvolution(Function):
    """A convolution in float32 whose gradients are computed in another type."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, options: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        stride, padding, dilation, groups = options
        return F.conv2d(x, w, None, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        x, w, ctx.options, ctx.dtype = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # noqa: ANN401
        operands = (tensor.to(ctx.dtype) for tensor in (grad, *ctx.saved_tensors))
        stride, padding, dilation, groups = ctx.options
        needed = [*ctx.needs_input_grad[:2], False]
        options = (None, stride, padding, dilation, False, [0, 0], groups, needed)
        grad_x, grad_w, _ = torch.ops.aten.convolution_backward(*operands, *options)
        # the engine brings them back to float32
        return grad_x, grad_w, None, None


class RealConv2d(nn.Conv2d):
    """A full-precision convolution of a binary network: under autocast too its output is float32.

    Rounding would turn signs, and every sign that turns, others. A binary convolution has no such trouble: -1 and +1
    are exact in bfloat16, and so is their sum, an even number, up to 512. Gradients pass no sign: autocast has them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C_in, H, W) -> (N, C_out, H', W')."""
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            x = x.to(self.weight.dtype)
            if isinstance(self.padding, str) or self.padding_mode != "zeros":
                return super().forward(x)
            options = (self.stride, self.padding, self.dilation, self.groups)
            out = cast(Tensor, _RealConvolution.apply(x, self.weight, options, dtype))
            return out if self.bias is None else out + self.bias[:, None, None]  # (C_out, 1, 1)


class RealLinear(nn.Linear):
    """A full-precision classifier of a binary network: float32 under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, in_features) -> (N, out_features)."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def binary_layers(model: nn.Module) -> Iterator[tuple[str, BinaryConv2d]]:
    """The binarized layers of a model with their names, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BinaryConv2d))
