"""The method, for any torch model: quantizers, layers, conversion, losses, the quantization error."""
