"""A packed network as ONNX: weights -1 and +1 in float32 and standard operators, which any runtime can run."""

import copy
import io
import logging
import os
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biper.errors import UsageError, one_line
from biper.files import atomically
from biper.nn.layers import replace_modules
from biper.packed.layers import FoldedNorm, PackedConv2d, PackedLinear
from biper.packed.network import PackedNetwork


class FloatConv2d(nn.Module):
    """A packed convolution with its weights as floats."""

    def __init__(self, layer: PackedConv2d) -> None:
        super().__init__()
        self.register_buffer("weight", layer.binary_weight())
        self.register_buffer("alpha", layer.alpha)
        self.register_buffer("bias", layer.bias)
        self.register_buffer("threshold", layer.threshold)
        self.shape = layer.stride, layer.padding, layer.dilation, layer.groups
        self.binary_activations = layer.binary_activations

    weight: Tensor
    alpha: Tensor
    bias: Tensor | None
    threshold: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, C_in, H, W) -> (N, C_out, H', W')."""
        if self.binary_activations:
            input = torch.where(input >= (0.0 if self.threshold is None else self.threshold), 1.0, -1.0)
        scaled = F.conv2d(input, self.weight, None, *self.shape) * self.alpha
        return scaled if self.bias is None else scaled + self.bias[:, None, None]


class FloatLinear(nn.Module):
    """A packed linear layer with its weights as floats."""

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        self.register_buffer("weight", layer.binary_weight())
        self.register_buffer("alpha", layer.alpha)
        self.register_buffer("bias", layer.bias)
        self.register_buffer("threshold", layer.threshold)
        self.binary_activations = layer.binary_activations

    weight: Tensor
    alpha: Tensor
    bias: Tensor | None
    threshold: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, ..., in_features) -> (N, ..., out_features)."""
        if self.binary_activations:
            input = torch.where(input >= (0.0 if self.threshold is None else self.threshold), 1.0, -1.0)
        scaled = F.linear(input, self.weight) * self.alpha
        return scaled if self.bias is None else scaled + self.bias


class Affine(nn.Module):
    """A folded batch norm as a product and a sum."""

    def __init__(self, norm: FoldedNorm) -> None:
        super().__init__()
        self.register_buffer("gain", norm.gain)
        self.register_buffer("shift", norm.shift)

    gain: Tensor
    shift: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, C, ...), and so is what comes out."""
        shape = (-1, *[1] * (input.dim() - 2))
        return input * self.gain.view(shape) + self.shift.view(shape)


def _floating(module: nn.Module) -> nn.Module | None:
    if isinstance(module, PackedConv2d):
        return FloatConv2d(module)
    if isinstance(module, PackedLinear):
        return FloatLinear(module)
    return Affine(module) if isinstance(module, FoldedNorm) else None


def float_network(packed: PackedNetwork) -> nn.Module:
    """A copy of a packed network with float weights and no operator of ours."""
    return replace_modules(copy.deepcopy(packed.network).cpu(), _floating).eval()


def require_exporter() -> None:
    """Raise UsageError where torch's exporter lacks its packages."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--onnx needs the package {error.name}: pip install 'biper[onnx]'") from error


def example_images(packed: PackedNetwork, image_size: int | None) -> Tensor:
    """Two images (2, 3, S, S) of that size, or of the network's own."""
    if image_size is not None and not (isinstance(image_size, int) and image_size > 0):
        raise UsageError(f"image_size is a number of pixels, not {image_size!r}")
    if image_size is None and packed.metadata is None:
        raise UsageError("this network does not say the size of its images: give image_size or example")
    size = image_size or (packed.metadata.shown_size if packed.metadata else 0)
    return torch.zeros(2, 3, size, size)


def require_fit(network: nn.Module, example: Tensor) -> None:
    """Raise UsageError unless the network takes such inputs."""
    try:
        with torch.no_grad():
            network(example)
    except Exception as error:  # of a network of somebody's own
        shape = tuple(example.shape)
        raise UsageError(f"the network does not take inputs {shape} ({one_line(error)}): give example=") from error


def export_onnx(
    packed: PackedNetwork,
    path: str | os.PathLike[str],
    image_size: int | None = None,
    *,
    example: Tensor | None = None,
) -> None:
    """Write an ONNX file with an input `images` (N, 3, S, S) and an output `logits` (N, classes), for any N.

    image_size: S; by default that of the network's metadata. example: two images or more, for a network that takes
    others. Raises UsageError where the exporter's packages are not installed, where the size of a network of one's own
    is not given, or where the network cannot be exported.
    """
    require_exporter()
    if not isinstance(packed, PackedNetwork):
        raise UsageError("ONNX files are written of packed networks: export_onnx(biper.pack(model), path)")
    example = example_images(packed, image_size) if example is None else example
    network = float_network(packed)
    require_fit(network, example)
    batch = {0: torch.export.Dim("batch", min=1)}
    loud = logging.getLogger("torch.onnx")
    level = loud.level
    with atomically(Path(path)) as temporary, warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of the exporter, about its own deprecations
        loud.setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                network,
                (example,),
                str(temporary),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) if hasattr(torch.export.Dim, "DYNAMIC") else (batch,),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except OSError:
            raise
        except Exception as error:
            raise UsageError(f"this network cannot be exported as ONNX: {one_line(error)}") from error
        finally:
            loud.setLevel(level)
