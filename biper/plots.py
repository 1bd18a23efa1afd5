"""Pictures of the quantization error. matplotlib is imported where it is used: it is slow to load."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from biper.binarize import sine
from biper.errors import UsageError
from biper.layers import binary_layers
from biper.models import Network
from biper.quantization import quantization_error

BINS = 61


@torch.no_grad()
def effective_weight_histograms(model: nn.Module) -> tuple[list[str], np.ndarray]:
    """Names of the binarized layers, and the share of each layer's sin(freq*w) per bin of [-1, 1]: (layers, BINS)."""
    names, rows = [], []
    for name, layer in binary_layers(model):
        counts = torch.histc(sine(layer.weight, layer.freq).float(), BINS, -1, 1)
        names.append(name)
        rows.append((counts / counts.sum()).cpu().numpy())
    return names, np.stack(rows)


def plot_quantization_error(models: Sequence[tuple[str, Network]], path: Path) -> None:
    """A column a checkpoint, (title, network): above where each layer's sin(freq*w) lie, below its error."""
    import matplotlib

    matplotlib.use("Agg")  # a file, also where there is no screen
    from matplotlib import pyplot as plt
    from matplotlib.colors import PowerNorm

    height = 2.5 + 0.22 * max(sum(1 for _ in binary_layers(model)) for _, model in models)
    figure, axes = plt.subplots(
        2, len(models), figsize=(1.5 + 4.5 * len(models), 2 * height), squeeze=False, layout="constrained"
    )
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UsageError(f"cannot write {path}: its ending is none of {', '.join(sorted(formats))}")
    histograms = [effective_weight_histograms(model) for _, model in models]
    densest = max(rows.max() for _, rows in histograms)
    for column, ((title, model), (names, rows)) in enumerate(zip(models, histograms, strict=True)):
        error = quantization_error(model)
        top, bottom = axes[:, column]
        places = np.arange(len(names))
        extent = (-1, 1, len(names) - 0.5, -0.5)
        image = top.imshow(rows, aspect="auto", extent=extent, cmap="viridis", norm=PowerNorm(0.5, 0, densest))
        m = model.metadata
        top.set(
            title=f"{title}\n{m.model}, stage {m.stage}, freq {m.freq:g}",
            xlabel="sin(freq·w)",
            yticks=places,
            yticklabels=names,
        )
        bottom.barh(places - 0.2, [layer.l1 for layer in error.layers], 0.4, label="L1, as published")
        bottom.barh(places + 0.2, [layer.squared for layer in error.layers], 0.4, label="squared, best scale")
        bottom.set(
            title=f"QE = {error.qe:.3f}, b = {error.b:.3f}",
            xlabel="quantization error",
            xlim=(0, 1),
            yticks=places,
            yticklabels=names,
        )
        bottom.invert_yaxis()
    axes[1, -1].legend(loc="lower right")
    figure.colorbar(image, ax=axes[0, :].tolist(), label="share of weights per bin")
    figure.savefig(path, dpi=120)
    plt.close(figure)
