"""Pictures of the quantization error and of results. matplotlib is imported where it is used: it is slow to load."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import nn

from biper.errors import UsageError
from biper.files import atomically, require_free
from biper.models import Network
from biper.nn.layers import binary_layers
from biper.nn.quantization_error import quantization_error
from biper.nn.quantizers import Periodic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 61
SPREAD = 4.0  # how many times a layer's mean magnitude histograms go
Line = tuple[Sequence[float], Sequence[float]]  # x, y
Lines = Sequence[tuple[str, Sequence[Line]]]  # a title, and a line a seed


@contextmanager
def picture(path: Path, rows: int, columns: int, width: float, height: float) -> Iterator[tuple["Figure", np.ndarray]]:
    """A figure and its axes (rows, columns), each of some inches, written at the end, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")  # a file, also where there is no screen
    from matplotlib import pyplot as plt

    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    try:
        yield figure, axes
        with atomically(path) as temporary:
            figure.savefig(temporary, dpi=120, format=path.suffix[1:].lower())
    finally:
        plt.close(figure)


def require_picture(path: Path) -> None:
    """Raise UsageError before work is done for an ending that is no picture's, or a file that may not be replaced."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UsageError(f"cannot write {path}: its ending is none of {', '.join(sorted(formats))}")
    require_free(path, is_picture)


def is_picture(path: Path) -> bool:
    """Whether a file begins as a picture of the usual kinds, whatever its name."""
    with path.open("rb") as file:
        if file.read(5) in (b"%PDF-", b"%!PS-", b"<?xml"):
            return True
    try:
        with Image.open(path, formats=("PNG", "JPEG", "TIFF", "WEBP", "GIF")):
            return True
    except (OSError, Image.DecompressionBombError):
        return False


@torch.no_grad()
def weight_histograms(model: nn.Module) -> tuple[list[str], np.ndarray, float]:
    """Names of the binarized layers, the share of each layer's real weights per bin of [-limit, limit], and the limit.

    They are what becomes binary: sin(freq*w), where the limit is 1; otherwise in units of the layer's mean magnitude.
    The shares are (layers, BINS).
    """
    layers = dict(binary_layers(model))
    periodic = all(isinstance(layer.weight_quantizer, Periodic) for layer in layers.values())
    limit, rows = 1.0 if periodic else SPREAD, []
    for layer in layers.values():
        real = layer.weight_quantizer.real(layer.weight).float()
        counts = torch.histc(real if periodic else _by_magnitude(real), BINS, -limit, limit)
        rows.append((counts / counts.sum()).cpu().numpy())
    return list(layers), np.stack(rows), limit


def _by_magnitude(real: torch.Tensor) -> torch.Tensor:
    """Weights in units of their mean magnitude; zeros as they are."""
    return real / real.abs().mean().clamp(min=torch.finfo(real.dtype).tiny)


def plot_quantization_error(models: Sequence[tuple[str, Network]], path: Path) -> None:
    """A column a checkpoint, (title, network): above where each layer's real weights lie, below its error."""
    from matplotlib.colors import PowerNorm

    height = 2.5 + 0.22 * max(sum(1 for _ in binary_layers(model)) for _, model in models)
    histograms = [weight_histograms(model) for _, model in models]
    densest = max(rows.max() for _, rows, _ in histograms)
    with picture(path, 2, len(models), 4.5 + 1.5 / len(models), height) as (figure, axes):
        for column, ((title, model), (names, rows, limit)) in enumerate(zip(models, histograms, strict=True)):
            m, top = model.metadata, axes[0, column]
            extent = (-limit, limit, len(names) - 0.5, -0.5)
            image = top.imshow(rows, aspect="auto", extent=extent, cmap="viridis", norm=PowerNorm(0.5, 0, densest))
            what = "sin(freq·w)" if limit == 1 else "real weight / mean magnitude"
            top.set(title=f"{title}\n{m.model}, stage {m.stage}\n{m.quantizer_text}", xlabel=what)
            top.set_yticks(np.arange(len(names)), names)
            _draw_errors(axes[1, column], model, names)
        figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.colorbar(image, ax=axes[0, :].tolist(), label="share of weights per bin")


@torch.no_grad()
def draw_weights(axes: "Axes", models: Mapping[str, nn.Module]) -> None:
    """A line a network, by title: how its real weights are spread, all layers together, each by its mean magnitude."""
    places = (np.arange(BINS) + 0.5) * 2 * SPREAD / BINS - SPREAD
    for title, model in models.items():
        counts = torch.zeros(BINS)
        for _, layer in binary_layers(model):
            real = layer.weight_quantizer.real(layer.weight).float()
            counts += torch.histc(_by_magnitude(real), BINS, -SPREAD, SPREAD)
        axes.plot(places, (counts / counts.sum()).numpy(), drawstyle="steps-mid", label=title)
    axes.set(xlabel="real weight / mean magnitude of its layer", ylabel="share per bin", title="weights")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_errors(axes: "Axes", model: Network, names: Sequence[str]) -> None:
    error, places = quantization_error(model), np.arange(len(names))
    axes.barh(places - 0.2, [layer.l1 for layer in error.layers], 0.4, label="L1, as published")
    axes.barh(places + 0.2, [layer.squared for layer in error.layers], 0.4, label="squared, best scale")
    axes.set(title=f"QE = {error.qe:.3f}, b = {error.b:.3f}", xlabel="quantization error")
    axes.set_xlim(0, max(1.0, *(layer.l1 for layer in error.layers)))
    axes.set_yticks(places, names)
    axes.invert_yaxis()


def draw_lines(axes: "Axes", lines: Lines, **labels: object) -> None:
    """Each title's lines in one colour: their mean, and thin the seeds. labels: of Axes.set."""
    for title, seeds in lines:
        xs = sorted({x for line, _ in seeds for x in line})
        means = [np.mean([y for line in seeds for u, y in zip(*line, strict=True) if u == x]) for x in xs]
        (mean,) = axes.plot(xs, means, label=title, marker="o" if len(xs) < 10 else "", markersize=4)
        if len(seeds) > 1:
            for line in seeds:
                axes.plot(*line, color=mean.get_color(), linewidth=0.6, alpha=0.5)
    axes.set(**labels)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=8)


def draw_bars(axes: "Axes", names: Sequence[str], groups: Sequence[tuple[str, Sequence[float]]], xlabel: str) -> None:
    """A row a name, in it a bar a group, (title, a value a name)."""
    height = 0.8 / len(groups)
    places = np.arange(len(names))
    for i, (title, values) in enumerate(groups):
        axes.barh(places + i * height, values, height, label=title)
    axes.set_yticks(places + height * (len(groups) - 1) / 2, names)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    # below the axes, where it can cover no bar
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(groups))
