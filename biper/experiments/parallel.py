"""Runs of an ablation beside each other, in processes of their own."""

import logging
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from biper.errors import USERS, ProcessLost, TrainingDiverged, UsageError, one_line
from biper.experiments.recipe import Given
from biper.experiments.run import conduct, is_there, logged
from biper.experiments.studies import Variant
from biper.lifetime import OF_TERMINALS, end_with_parent

log = logging.getLogger("biper")
POLL = 1.0  # seconds


@dataclass(frozen=True)
class Jobs:
    """How many runs are trained at a time, and what makes a process of theirs ready, which it is sent to."""

    count: int
    prepare: Callable[[], None]


SERIAL = Jobs(1, lambda: None)


@dataclass(frozen=True)
class Trial:
    """A variant of a family's recipe with a seed, in the folder of an ablation."""

    family: str
    variant: Variant
    seed: int
    folder: Path

    @property
    def settings(self) -> dict[int, Given]:
        """Those of its stages, by number."""
        return {stage: settings for stage, (_, settings) in self.variant.stages.items()}

    @property
    def homes(self) -> dict[int, Path]:
        """The folders of its stages, by number."""
        return self.variant.homes(self.seed, self.folder)


def train_beside(trials: Sequence[Trial], jobs: Jobs) -> dict[Path, str]:
    """Train every run that the trials need and that is not there yet, several at a time, each on one thread.

    A stage 2 follows its stage 1, and what several trials share is trained once. Returns the folders of runs that
    diverged, with what was said of it. Raises UsageError for what a run met that the user can mend, and ProcessLost if
    a process ended; the others end too, and what they saved stays.
    """
    left = {home: (trial, s) for trial in trials for s, home in trial.homes.items() if not is_there(home, s)}
    diverged: dict[Path, str] = {}
    if not left:
        return diverged
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(jobs.count, context, _begin, (jobs.prepare,)) as executor,
        tqdm(total=len(left), desc="runs", unit="run", disable=None) as bar,
    ):
        try:
            for ended, (home, error) in enumerate(_in_turn(executor, left, jobs.count), 1):
                bar.update()
                log.info("%d of %d runs: %s: %s", ended, len(left), "/".join(home.parts[-3:]), error or _came_to(home))
                if error:
                    diverged[home] = error
        except BaseException as error:
            for process in multiprocessing.active_children():  # which would go on to the ends of their runs
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise ProcessLost("one of --jobs; the same command goes on from what is saved") from error
            raise
    return diverged


def _in_turn(
    executor: ProcessPoolExecutor, left: Mapping[Path, tuple[Trial, int]], jobs: int
) -> Iterator[tuple[Path, str]]:
    """The folders of the runs as they end, each with what was said if it diverged, or that which it starts from."""
    running: dict[Future[str], Path] = {}
    ready: deque[Path] = deque()
    waiting: dict[Path, list[Path]] = {}  # by the folder of stage 1 the stages 2 that start from it
    for home, (trial, stage) in left.items():
        first = trial.homes.get(1) if stage == 2 else None
        if first in left and first is not None:
            waiting.setdefault(first, []).append(home)
        else:
            ready.append(home)
    alive = 0
    while ready or running:
        while ready and len(running) < jobs:
            home = ready.popleft()
            with _as_jobs_start():
                running[executor.submit(_conduct, *left[home])] = home
        alive = max(alive, len(multiprocessing.active_children()))
        ended = wait(running, POLL, FIRST_COMPLETED).done
        # the executor itself watches those that were there when it last woke, not the one that was started last
        if not ended and len(multiprocessing.active_children()) < alive:
            raise BrokenProcessPool("a process has ended")
        for future in ended:
            home = running.pop(future)
            error = future.result()
            yield home, error
            seconds = waiting.pop(home, [])
            if error:
                yield from ((second, error) for second in seconds)
            else:
                ready.extendleft(reversed(seconds))  # what has begun is finished first


@contextmanager
def _as_jobs_start() -> Iterator[None]:
    """Context: what a process that starts in it inherits. It has one thread, and a terminal's signals are not for it.

    They reach all of its processes; the one that started the others ends them.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in OF_TERMINALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


def _came_to(home: Path) -> str:
    """What a finished run came to."""
    best = max(float(row["test_top1"]) for row in logged(home))
    return f"best top-1 {best:.2f} %"


_UNFIT: list[str] = []  # what the preparation of this process met, which the user can mend


def _begin(prepare: Callable[[], None]) -> None:
    """Make a process of the pool ready. It ends with the one that started it, however that ended."""
    try:
        prepare()
    except USERS as error:
        _UNFIT.append(str(error))
    end_with_parent()


def _conduct(trial: Trial, last: int) -> str:
    """Train a trial up to a stage. Returns what was said if it diverged, else an empty text."""
    if _UNFIT:
        raise UsageError(_UNFIT[0])
    try:
        stages = {stage: settings for stage, settings in trial.settings.items() if stage <= last}
        conduct(trial.family, stages, trial.seed, trial.homes)
    except TrainingDiverged as error:
        return one_line(error)
    except USERS as error:  # as one that travels between processes
        raise UsageError(f"{'/'.join(trial.homes[last].parts[-3:])}: {error}") from None
    return ""
