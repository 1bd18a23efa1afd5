"""Draw accuracy against size of the networks in pretrained_models/: python scripts/draw_accuracy.py [FILE.png]."""

import json
import sys
from pathlib import Path

from biper.experiments.plots import picture

ROOT = Path(__file__).resolve().parents[1]
KINDS = {  # of a network: its bytes and its top-1, fields of result.json
    "stage 1: real weights, float32": ("float_bytes", "stage1_top1"),
    "stage 2: binary weights, float32": ("float_bytes", "float_top1"),
    "stage 2: packed": ("packed_bytes", "packed_top1"),
}


def main() -> None:
    """A colour a network, a marker a kind of file."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "accuracy.png"
    with picture(path, 1, 1, 6, 4) as (_, axes):
        plot, heights = axes[0, 0], []
        for i, file in enumerate(sorted(ROOT.glob("pretrained_models/*/result.json"))):
            facts = json.loads(file.read_text())
            for marker, (kind, (size, top1)) in zip("^os", KINDS.items(), strict=True):
                x, y = facts[size] / 1e6, facts[top1]
                heights.append(y)
                label = f"{facts['model']}, {facts['data']}, {kind}"
                plot.plot(x, y, marker, color=f"C{i}", markersize=8, label=label)
                plot.annotate(f"{y:.2f} %, {x:.3g} MB", (x, y), (8, -4), textcoords="offset points", fontsize=8)
        plot.set(xscale="log", xlabel="file (MB)", ylabel="top-1 (%)", xlim=(0.03, 100))
        plot.set_ylim(min(heights) - 2, max(heights) + 4)
        plot.grid(alpha=0.3)
        plot.legend(fontsize=8, loc="upper right")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
