"""The method, for any torch model: quantizers, layers, conversion, losses, the quantization error."""

DEFAULT_FREQ = 30.0  # radians per unit weight, where nobody says another: the published default; the recipes say 20


def fitted(freq_scale: float) -> str:
    """What the setting `quantizer` is called for BiPer with each layer's own frequency."""
    return f"biper:freq_scale={float(freq_scale)!r}"


def is_fitted(quantizer: str) -> bool:
    """Whether a setting `quantizer` means BiPer with each layer's own frequency."""
    return quantizer.startswith("biper:freq_scale=")
