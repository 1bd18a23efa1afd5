"""Tables of results: means and standard deviations, and Markdown to read."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One quantity, measured once a seed. digits: how many are shown behind the point."""

    values: Mapping[int, float]
    digits: int = 2

    @property
    def mean(self) -> float:
        """The mean."""
        return statistics.fmean(self.values.values())

    @property
    def std(self) -> float | None:
        """The standard deviation of a sample (n - 1); None for one value."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    def number(self, value: float | None) -> str:
        """A value as it is shown."""
        return "-" if value is None else f"{value:,.{self.digits}f}"

    def row(self, seeds: Sequence[int]) -> list[float | None]:
        """n, mean, standard deviation, and the value of every seed, None where there is none."""
        return [len(self.values), self.mean, self.std, *(self.values.get(seed) for seed in seeds)]

    def __str__(self) -> str:
        return self.number(self.mean) + ("" if self.std is None else f" ± {self.number(self.std)}")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, a line a row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
