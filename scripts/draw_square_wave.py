"""Draw docs/square_wave.png: the square wave, its surrogate, the surrogate's gradient and their period."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

from biper import square_wave
from biper.nn.functional import sine

FREQ = 20.0
TARGET = Path(__file__).resolve().parents[1] / "docs" / "square_wave.png"


def draw(target: Path) -> None:
    """Save the picture; every curve is computed by the functions that training uses."""
    period = 2 * math.pi / FREQ
    w = torch.linspace(-period, period, 2001, requires_grad=True)
    binary = square_wave(w, FREQ)
    binary.sum().backward()
    assert w.grad is not None
    figure, axes = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True, layout="constrained", height_ratios=(2, 1))
    x = w.detach().numpy()
    axes[0].plot(x, binary.detach().numpy(), label="forward, stage 2: sign(sin(freq·w))", linewidth=2)
    axes[0].plot(
        x, sine(w, FREQ).detach().numpy(), label="surrogate, and stage 1's weight: sin(freq·w)", linestyle="--"
    )
    axes[0].annotate("", (0, -1.25), (period, -1.25), arrowprops={"arrowstyle": "<->"})
    axes[0].text(period / 2, -1.5, f"period 2π/freq = {period:.3f}", ha="center", va="top")
    axes[0].set(ylim=(-1.9, 1.9), ylabel="weight used")
    axes[0].legend(loc="upper left", ncols=2)
    axes[1].plot(x, w.grad.numpy(), color="tab:green", label="gradient of both: freq·cos(freq·w)")
    axes[1].set(xlabel=f"latent weight w (freq = {FREQ:g})", ylabel="gradient", ylim=(-1.3 * FREQ, 1.9 * FREQ))
    axes[1].legend(loc="upper left")
    figure.savefig(target, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw(TARGET)
