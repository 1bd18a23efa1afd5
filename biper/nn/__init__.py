"""The method, for any torch model: quantizers, layers, conversion, losses, the quantization error."""

DEFAULT_FREQ = 30.0  # radians per unit weight, where nobody says another: the published default; the recipes say 20
