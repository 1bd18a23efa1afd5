"""BiPer: binary neural networks using a periodic function (CVPR 2024, arXiv 2404.01278).

The names below are the public API. They are imported on first use, so that `--help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biper.models import Network, create_model, list_models
    from biper.models.checkpoint import load_checkpoint
    from biper.models.registry import Precision, register_model
    from biper.nn.activations import RPReLU
    from biper.nn.comparison_quantizers import XNOR, ErrorDecaySign, IRNet, ReCU, RSign
    from biper.nn.convert import convert
    from biper.nn.functional import binary_sign, square_wave
    from biper.nn.layers import BinaryConv2d, BinaryLinear, binarize_
    from biper.nn.losses import periodic_regularizer
    from biper.nn.quantization_error import quantization_error
    from biper.nn.quantizers import (
        InputQuantizer,
        PolynomialSign,
        Sign,
        Sine,
        SquareWave,
        WeightQuantizer,
        register_quantizer,
    )
    from biper.packed.file import load_packed, save_packed
    from biper.packed.onnx import export_onnx
    from biper.packed.pack import pack
    from biper.packed.qonnx import export_qonnx

__version__ = "0.2.0"
__all__ = [
    "XNOR",
    "BinaryConv2d",
    "BinaryLinear",
    "ErrorDecaySign",
    "IRNet",
    "InputQuantizer",
    "Network",
    "PolynomialSign",
    "Precision",
    "RPReLU",
    "RSign",
    "ReCU",
    "Sign",
    "Sine",
    "SquareWave",
    "WeightQuantizer",
    "binarize_",
    "binary_sign",
    "convert",
    "create_model",
    "export_onnx",
    "export_qonnx",
    "list_models",
    "load_checkpoint",
    "load_packed",
    "pack",
    "periodic_regularizer",
    "quantization_error",
    "register_model",
    "register_quantizer",
    "save_packed",
    "square_wave",
]

_HOME = {
    "models": ("Network", "create_model", "list_models"),
    "models.checkpoint": ("load_checkpoint",),
    "models.registry": ("Precision", "register_model"),
    "nn.activations": ("RPReLU",),
    "nn.comparison_quantizers": ("XNOR", "ErrorDecaySign", "IRNet", "ReCU", "RSign"),
    "nn.convert": ("convert",),
    "nn.functional": ("binary_sign", "square_wave"),
    "nn.layers": ("BinaryConv2d", "BinaryLinear", "binarize_"),
    "nn.losses": ("periodic_regularizer",),
    "nn.quantization_error": ("quantization_error",),
    "nn.quantizers": (
        "InputQuantizer",
        "PolynomialSign",
        "Sign",
        "Sine",
        "SquareWave",
        "WeightQuantizer",
        "register_quantizer",
    ),
    "packed.file": ("load_packed", "save_packed"),
    "packed.onnx": ("export_onnx",),
    "packed.pack": ("pack",),
    "packed.qonnx": ("export_qonnx",),
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562)
    home = next((home for home, names in _HOME.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'biper' has no attribute {name!r}")
    value = getattr(import_module(f"biper.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
