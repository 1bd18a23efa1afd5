"""From files to batches of pixels: what a reader gives, and the one that decodes with Pillow in worker processes."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from biper.data.crops import View, cut
from biper.data.folder import open_image, without_warnings
from biper.data.samples import Samples
from biper.data.sharding import make_generator
from biper.errors import UsageError, WorkerLost, one_line
from biper.lifetime import OF_TERMINALS, end_with_parent

T = TypeVar("T")
Requests = Iterable["Request"]  # of one batch
DAMAGED_IN_A_ROW = 20


class Request(NamedTuple):
    """An image, and the epoch, which with the image decides where a random view looks."""

    image: int
    epoch: int


class Batch(NamedTuple):
    """pixels (B, S, S, 3) uint8 and labels (B,); for each that was replaced what was wrong on the way; or an error."""

    pixels: Tensor
    labels: Tensor
    replaced: list[list[str]]
    error: str = ""


class Reader(Protocol):
    """Reads batches of the images that are asked for, in that order."""

    def read(self, batches: Iterator[Requests]) -> Iterator[Batch]:
        """One Batch for each that is asked for."""


@dataclass(frozen=True)
class Source:
    """The images of a loader and how they are looked at. replace: take the next image for one that is damaged."""

    samples: Samples
    view: View
    seed: int
    replace: bool

    def read_intact(self, request: Request, read: Callable[[Request], T]) -> tuple[T, int, list[str]]:
        """What `read` gives for an image, or if it is damaged and may be replaced for the next one, and its label.

        Also what was wrong. Raises UsageError naming the image if it may not be replaced.
        """
        wrong: list[str] = []
        index = request.image
        while True:
            try:
                return read(Request(index, request.epoch)), int(self.samples.labels[index]), wrong
            except UsageError as error:
                wrong.append(str(error))
                if not self.replace:
                    raise
                if len(wrong) == DAMAGED_IN_A_ROW:
                    raise UsageError(f"{len(wrong)} images in a row are damaged, the last: {error}") from error
                index = (index + 1) % len(self.samples)

    def random(self, request: Request) -> np.random.Generator:
        """What decides where a random view looks: the same for every reader and every number of processes."""
        return make_generator(self.seed, request.epoch, request.image)


class PillowDataset(Dataset[Batch]):
    """Whole batches decoded with Pillow; runs in the worker processes."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @without_warnings()
    def __getitem__(self, requests: Requests) -> Batch:
        try:
            images, labels, wrong = zip(*(self.source.read_intact(r, self._pixels) for r in requests), strict=True)
        except UsageError as error:  # told, not raised: DataLoader would add a traceback
            return Batch(torch.empty(0), torch.empty(0), [], str(error))
        return Batch(torch.from_numpy(np.stack(images)), torch.tensor(labels), [w for w in wrong if w])

    def _pixels(self, request: Request) -> np.ndarray:
        image = open_image(self.source.samples.path(request.image))
        width, height = image.size
        return cut(image, self.source.view.window(width, height, self.source.random(request)))


class _Asked:
    """DataLoader's sampler: what was last asked for.

    An object of its own: in a cycle of references the worker processes would end only when garbage is collected, late
    and slowly.
    """

    def __init__(self) -> None:
        self.batches: Iterator[Requests] = iter(())

    def __iter__(self) -> Iterator[Requests]:
        return self.batches


class PillowReader:
    """Decodes in `workers` processes, at most one a CPU core; 0: in this one. A Reader.

    The processes come from a fork server: forking a process that has threads, or CUDA, can hang.
    """

    def __init__(self, source: Source, workers: int, pin_memory: bool) -> None:
        self.asked = _Asked()
        workers = min(workers, count_cores())
        self.loader = DataLoader(
            PillowDataset(source),
            batch_size=None,  # a request is for a whole batch
            sampler=self.asked,
            num_workers=workers,
            collate_fn=_pass_on,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
            multiprocessing_context=_make_context() if workers else None,
            generator=torch.Generator(),  # else each pass draws from torch's own, whose state a checkpoint keeps
        )

    def read(self, batches: Iterator[Requests]) -> Iterator[Batch]:
        """One Batch for each that is asked for. Raises WorkerLost if a process that decodes has ended."""
        self.asked.batches = batches
        try:
            yield from self.loader
        except torch.OutOfMemoryError:  # of pinned memory
            raise
        except (RuntimeError, EOFError, ConnectionError) as error:  # as soon as torch has noticed, or its pipe ends
            if not self.loader.num_workers:
                raise
            raise WorkerLost(one_line(error)) from error


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _make_context() -> multiprocessing.context.BaseContext:
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not once a worker
    return context


def _start_worker(number: int) -> None:
    end_with_parent()  # torch's worker asks for its parent's number, which is that of the fork server
    for signum in OF_TERMINALS:
        signal.signal(signum, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _pass_on(batch: Any) -> Any:  # noqa: ANN401
    return batch
