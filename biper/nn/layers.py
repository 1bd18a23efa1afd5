"""The layers: convolutions and linear layers with binary weights and inputs; and those that stay real."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from biper.errors import UsageError
from biper.nn import (
    DEFAULT_FREQ,
    comparison_quantizers,  # noqa: F401  imported so that their classes are registered wherever there are layers
    fitted_quantizers,  # noqa: F401
)
from biper.nn.quantizers import InputQuantizer, PolynomialSign, Sine, WeightQuantizer

BIPER_INPUTS = PolynomialSign(standardized=True)  # layers take copies
ONE_SIDED = "all activations are +1: {} sees no negative input, such as a ReLU leaves; put a hardtanh in its place"


class _Quantized(nn.Module):
    """What the binary layers share: their quantizers, and a warning where signs say nothing.

    watched: whether the inputs' signs were looked at, and what was found. A dictionary, as DataParallel's replicas,
    which live for a step, share it.
    """

    weight: Tensor
    alpha: Tensor
    weight_quantizer: WeightQuantizer
    input_quantizer: InputQuantizer | None

    def _take(
        self,
        weight_quantizer: WeightQuantizer | None,
        input_quantizer: InputQuantizer | None,
        input_shape: tuple[int, ...],
    ) -> None:
        """Take copies. input_shape: of a tensor with a number for each input channel, which broadcasts over inputs."""
        weight_quantizer = Sine(DEFAULT_FREQ) if weight_quantizer is None else weight_quantizer
        for value, kind in ((weight_quantizer, WeightQuantizer), (input_quantizer, InputQuantizer)):
            if value is not None and not isinstance(value, kind):
                raise UsageError(f"expected a {kind.__name__} such as biper.Sign(), not {value!r}")
        self.weight_quantizer = copy.deepcopy(weight_quantizer)
        self.weight_quantizer.fit((len(self.weight), *[1] * (self.weight.dim() - 1)))
        self.weight_quantizer.to(self.weight)
        self.weight_quantizer.start(self.weight.detach())
        self.input_quantizer = copy.deepcopy(input_quantizer)
        if self.input_quantizer is not None:
            self.input_quantizer.fit(input_shape)
            self.input_quantizer.to(self.weight)
        self.watched: dict[str, bool] = {}

    def effective_weight(self) -> Tensor:
        """The weight that the layer uses, without alpha: of the shape of `weight`."""
        return self.weight_quantizer.effective(self.weight)

    def output_scale(self) -> Tensor:
        """What the sums are multiplied with: alpha, times the weights' own scale if their quantizer has one."""
        scale = self.weight_quantizer.scale(self.weight)
        return self.alpha if scale is None else self.alpha * scale.view_as(self.alpha)

    def quantized_input(self, a: Tensor) -> Tensor:
        """The signs of the activations, or the activations where the inputs stay real."""
        if self.input_quantizer is None:
            return a
        signs: Tensor = self.input_quantizer(a)
        if self.training:
            self.watch(signs)
        return signs

    def watch(self, signs: Tensor) -> None:
        """Warn once, of the first batch of a training, if all signs are +1; this waits for the device, once."""
        if self.watched or torch.compiler.is_compiling() or not signs.numel():
            return
        self.watched["one_sided"] = bool((signs > 0).all())
        if self.watched["one_sided"]:
            warnings.warn(ONE_SIDED.format(f"a layer of {tuple(self.weight.shape)}"), stacklevel=3)


class BinaryConv2d(_Quantized, nn.Conv2d):
    """conv2d(quantized input, quantized weight) * alpha + bias; alpha times the quantizer's scale if it has one.

    weight_quantizer: from `weight`, the latent weights (C_out, C_in/groups, k, k), to the effective ones; by default
    BiPer's first stage. input_quantizer: from activations to signs; None leaves them real. The layer takes copies of
    both. `alpha` (C_out, 1, 1) is learned, initialized U(0, 1). Zero padding stays zero: it is no binary value. The
    rest is torch.nn.Conv2d's, without a bias unless asked for. Raises UsageError (a ValueError) for padding modes other
    than zeros. [BiPer, arXiv 2404.01278]
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_quantizer: WeightQuantizer | None = None,
        input_quantizer: InputQuantizer | None = BIPER_INPUTS,
    ) -> None:
        if padding_mode != "zeros":
            raise UsageError(f"padding_mode {padding_mode!r}: a binary convolution pads with zeros alone")
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        super().__init__(*shape, device=device, dtype=dtype)
        self._take(weight_quantizer, input_quantizer, (in_channels, 1, 1))
        self.alpha = nn.Parameter(torch.rand(out_channels, 1, 1, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:  # as torch.nn.Conv2d calls it
        """input: (N, C_in, H, W) -> (N, C_out, H', W')."""
        if input.dim() != 4:
            shape = tuple(input.shape)
            raise UsageError(f"BinaryConv2d takes batches (N, C, H, W), not {shape}: one image is x[None]")
        x, w = self.quantized_input(input), self.weight_quantizer(self.weight)
        sums = F.conv2d(x, w, None, self.stride, self.padding, self.dilation, self.groups)
        out = sums * self.output_scale()
        return out if self.bias is None else out + self.bias[:, None, None]  # (C_out, 1, 1) over (N, C_out, H', W')


class BinaryLinear(_Quantized, nn.Linear):
    """linear(quantized input, quantized weight) * alpha + bias: BinaryConv2d's counterpart.

    `weight`: (out_features, in_features); `alpha`: (out_features,), learned, initialized U(0, 1).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_quantizer: WeightQuantizer | None = None,
        input_quantizer: InputQuantizer | None = BIPER_INPUTS,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._take(weight_quantizer, input_quantizer, (in_features,))
        self.alpha = nn.Parameter(torch.rand(out_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:  # as torch.nn.Linear calls it
        """input: (N, ..., in_features) -> (N, ..., out_features)."""
        if input.dim() < 2:
            shape = tuple(input.shape)
            raise UsageError(f"BinaryLinear takes batches (N, ..., features), not {shape}: one is x[None]")
        out = F.linear(self.quantized_input(input), self.weight_quantizer(self.weight)) * self.output_scale()
        return out if self.bias is None else out + self.bias


BinaryLayer: TypeAlias = BinaryConv2d | BinaryLinear


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

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, C_in, H, W) -> (N, C_out, H', W')."""
        device = input.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(input)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            x = input.to(self.weight.dtype)
            if isinstance(self.padding, str) or self.padding_mode != "zeros":
                return super().forward(x)
            options = (self.stride, self.padding, self.dilation, self.groups)
            out = cast(Tensor, _RealConvolution.apply(x, self.weight, options, dtype))
            return out if self.bias is None else out + self.bias[:, None, None]  # (C_out, 1, 1)


class RealLinear(nn.Linear):
    """A full-precision classifier of a binary network: float32 under autocast too."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, in_features) -> (N, out_features)."""
        if not torch.is_autocast_enabled(input.device.type):  # quicker: small networks wait for it
            return super().forward(input.to(self.weight.dtype))
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


def binary_layers(model: nn.Module) -> Iterator[tuple[str, BinaryLayer]]:
    """The binarized layers of a model with their names, in the model's order."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected a torch.nn.Module, not {type(model).__name__}")
    kinds = (BinaryConv2d, BinaryLinear)
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))


def replace_modules(network: nn.Module, new: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """The network itself, with new(module) in the place of each module for which it is not None, once for each."""
    made: dict[nn.Module, nn.Module] = {}

    def made_of(module: nn.Module) -> nn.Module:
        if module not in made:
            made[module] = new(module) or module
        return made[module]

    for module in list(network.modules()):
        for name, child in module._modules.items():  # a layer that is used twice too
            if child is not None:
                module._modules[name] = made_of(child)
    return made_of(network)


def binarize_(model: nn.Module) -> nn.Module:
    """Make a model's real quantizers binary, in place: Sine(freq) becomes SquareWave(freq). Returns the model.

    Latent weights stay, so the binary weights are the signs of the real ones: BiPer's warm start of stage 2. What is
    binary stays as it is. Raises UsageError for a model without binary layers. [BiPer, stage 2]
    """
    layers = [layer for _, layer in binary_layers(model)]
    if not layers:
        raise UsageError("there is nothing to make binary: the model has no binary layers (see biper.convert)")
    quantizers = [layer.weight_quantizer.binarized() for layer in layers]
    if real := [type(quantizer).__name__ for quantizer in quantizers if not quantizer.binary]:
        raise UsageError(f"{real[0]} is real, and has no binarized() that says what comes after it")
    for layer, quantizer in zip(layers, quantizers, strict=True):
        layer.weight_quantizer = quantizer.train(layer.training).to(layer.weight)
    return model
