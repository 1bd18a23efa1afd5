"""Say what the quickstart came to, from the data that it wrote: python scripts/summarize_quickstart.py RESULTS."""

import csv
import json
import sys
from pathlib import Path


def main() -> None:
    """RESULTS has stage1/metrics.csv, stage2/metrics.csv, and packed.json by export.py --facts."""
    results = Path(sys.argv[1])
    facts = json.loads((results / "packed.json").read_text())
    speed = facts["speeds"][-1]  # of the larger batch
    smaller = f"{facts['times_smaller']:.1f} times smaller than in float32"
    times = f"{speed['packed_ms']:.2f} ms, before packing {speed['float32_ms']:.2f} ms"
    for title, text in {
        "stage 1, real weights": best(results / "stage1" / "metrics.csv"),
        "stage 2, binary weights": best(results / "stage2" / "metrics.csv"),
        "packed file": f"{facts['packed']}, {facts['packed_bytes']} bytes, {smaller}",
        "its speed": f"{speed['images']} image(s), {facts['threads']} threads: {times}: "
        f"{speed['times_as_fast']:.1f} times as fast",
    }.items():
        print(f"{title + ':':25} {text}")


def best(metrics: Path) -> str:
    """The epoch of the highest top-1, the first of equals, as in the run's own log."""
    with metrics.open() as file:
        row = max(csv.DictReader(file), key=lambda row: float(row["test_top1"]))
    top1, top5 = float(row["test_top1"]), float(row["test_top5"])
    return f"best top-1 {top1:.2f} %, top-5 {top5:.2f} % (epoch {row['epoch']})"


if __name__ == "__main__":
    main()
