"""Cases, one after the other, in this process, and what came of them."""

import random
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from biper.errors import UsageError, printable
from biper.training.checkpoint import LATEST

from .corpus import Corpus, fuzzed_model, make_corpus
from .readers import READERS, Reader

SECONDS, MEMORY = 30.0, 2 * 2**30  # that a case may take; bytes beyond what the process has before


@dataclass
class Tally:
    """What came of a reader's cases. tracebacks: by what was raised and where, with the first case that raised it."""

    accepted: int = 0
    refused: int = 0
    failed: int = 0
    slowest: float = 0.0
    tracebacks: dict[str, str] = field(default_factory=dict)

    def row(self, name: str) -> str:
        """A line of the table."""
        cases = self.accepted + self.refused + self.failed
        return f"{name:22}{cases:7}{self.accepted:10}{self.refused:9}{self.failed:12}{self.slowest:10.2f} s"


HEADER = f"{'reader':22}{'cases':>7}{'accepted':>10}{'refused':>9}{'tracebacks':>12}{'slowest':>12}"


class TooSlowError(Exception):
    """A case has taken longer than it may."""


def campaign(cases: int, seed: int, folder: Path, keep: Path | None = None) -> dict[str, Tally]:
    """So many cases, over all readers in turn, the same ones for a seed; keep: where files go that break a reader."""
    tallies = {reader.name: Tally() for reader in READERS}
    with fuzzed_model():
        corpus = make_corpus(folder)
        with _bounded():
            _run_all(cases, seed, corpus, folder, tallies, keep)
    return tallies


def _run_all(cases: int, seed: int, corpus: Corpus, folder: Path, tallies: dict[str, Tally], keep: Path | None) -> None:
    for number in range(cases):
        reader = READERS[number % len(READERS)]
        with TemporaryDirectory(dir=folder) as place:
            _run(reader, f"{seed}:{number}", corpus, Path(place) / LATEST, tallies[reader.name], keep)


def _run(reader: Reader, case: str, corpus: Corpus, path: Path, tally: Tally, keep: Path | None) -> None:
    draw = random.Random(case)
    while True:
        try:
            reader.spoil(draw, corpus, path)
            break
        except Exception:  # what cannot be written cannot be read either
            path.unlink(missing_ok=True)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                reader.read(corpus, path)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        tally.accepted += 1
    except UsageError:
        tally.refused += 1
    except Exception as error:
        tally.failed += 1
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {printable(str(error))[:200]} ({frame.filename}:{frame.lineno})"
        if tally.tracebacks.setdefault(what, case) == case and keep:
            (keep / f"{reader.name.replace(', ', '_')}-{case.replace(':', '-')}").write_bytes(path.read_bytes())
    tally.slowest = max(tally.slowest, time.perf_counter() - start)


@contextmanager
def _bounded() -> Iterator[None]:
    """Context: this process gets no more memory than MEMORY beyond what it has, and an alarm ends a slow case."""

    def end(*_: object) -> None:
        raise TooSlowError

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, end)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)
