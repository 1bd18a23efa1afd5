"""Tables of results: means and standard deviations, as Markdown to read and as CSV to count on."""

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from biper.checkpoint import replaced


@dataclass(frozen=True)
class Sample:
    """One quantity, measured once a seed. digits: how many are shown behind the point."""

    values: tuple[float, ...]
    digits: int = 2

    @property
    def mean(self) -> float:
        """The mean."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """The standard deviation of a sample (n - 1); None for one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def number(self, value: float | None) -> str:
        """A value as it is shown."""
        return "-" if value is None else f"{value:,.{self.digits}f}"

    def __str__(self) -> str:
        return self.number(self.mean) + ("" if self.std is None else f" ± {self.number(self.std)}")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, a line a row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_csv(head: Sequence[str], rows: Sequence[Sequence[object]], path: Path) -> None:
    """A table as CSV, with full precision; None is an empty field."""
    with replaced(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


def write_text(text: str, path: Path) -> None:
    """A text file, whole or not at all."""
    with replaced(path) as temporary:
        temporary.write_text(text.rstrip() + "\n")
