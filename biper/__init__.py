"""BiPer: binary neural networks using a periodic function (CVPR 2024, arXiv 2404.01278).

The names below are the public API. They are imported on first use, so that `--help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biper.models import create_model, list_models
    from biper.models.checkpoint import load_checkpoint
    from biper.nn.functional import binary_sign, square_wave
    from biper.nn.layers import BinaryConv2d
    from biper.nn.quantization_error import quantization_error

__version__ = "0.1.0"
__all__ = [
    "BinaryConv2d",
    "binary_sign",
    "create_model",
    "list_models",
    "load_checkpoint",
    "quantization_error",
    "square_wave",
]

_HOME = {
    "BinaryConv2d": "nn.layers",
    "binary_sign": "nn.functional",
    "create_model": "models",
    "list_models": "models",
    "load_checkpoint": "models.checkpoint",
    "quantization_error": "nn.quantization_error",
    "square_wave": "nn.functional",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562)
    if name not in _HOME:
        raise AttributeError(f"module 'biper' has no attribute {name!r}")
    value = getattr(import_module(f"biper.{_HOME[name]}"), name)
    globals()[name] = value
    return value
