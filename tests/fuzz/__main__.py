"""python -m tests.fuzz --cases N --seed S [--keep DIR]. Exits with 1 if a reader broke."""

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from .campaign import HEADER, campaign

parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Spoil files and read them.")
parser.add_argument("--cases", type=int, default=1000, metavar="N", help="over all readers (default 1000)")
parser.add_argument("--seed", type=int, default=0, metavar="S", help="the same cases for a seed (default 0)")
parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the first file of each kind that breaks a reader")


def main() -> None:
    """Print the table by reader, and what was raised."""
    given = parser.parse_args()
    if given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with TemporaryDirectory() as folder:
        tallies = campaign(given.cases, given.seed, Path(folder), given.keep)
    print(HEADER, *(tally.row(name) for name, tally in tallies.items()), sep="\n")
    print(f"{1000 * (time.perf_counter() - start) / given.cases:.0f} s per 1,000 cases")
    for name, tally in tallies.items():
        for what, case in tally.tracebacks.items():
            print(f"{name}, case {case}: {what}")
    sys.exit(any(tally.failed for tally in tallies.values()))


if __name__ == "__main__":
    main()
