"""Tables of results: means and standard deviations, and Markdown to read."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One quantity, measured once a seed; NaN where it is not known. digits: how many are shown behind the point."""

    values: Mapping[int, float]
    digits: int = 2

    @property
    def known(self) -> list[float]:
        """The values without NaN: the mean, the deviation and n are theirs."""
        return [value for value in self.values.values() if not math.isnan(value)]

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self.known)

    @property
    def mean(self) -> float:
        """The mean; NaN of none."""
        return statistics.fmean(self.known) if self.known else math.nan

    @property
    def std(self) -> float | None:
        """The standard deviation of a sample (n - 1); None for one value."""
        return statistics.stdev(self.known) if self.n > 1 else None

    def number(self, value: float | None) -> str:
        """A value as it is shown."""
        return "-" if value is None or math.isnan(value) else f"{value:,.{self.digits}f}"

    def columns(self, seeds: Sequence[int]) -> dict[str, float | None]:
        """A row of a CSV table: n, mean, standard deviation, and the value of every seed; None where there is none."""
        values = {"mean": self.mean, "std": self.std} | {f"seed_{seed}": self.values.get(seed) for seed in seeds}
        return {"n": self.n} | {k: None if v is None or math.isnan(v) else v for k, v in values.items()}

    def __str__(self) -> str:
        return self.number(self.mean) + ("" if self.std is None else f" ± {self.number(self.std)}")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, a line a row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
