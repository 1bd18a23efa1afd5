"""The process: devices, seeds and random states, signals, and reading from a device without waiting for it."""

import ctypes
import os
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from biper.errors import OutOfMemory, UsageError, one_line
from biper.lifetime import OF_TERMINALS
from biper.training.distributed import Processes

ALONE = Processes()
ALWAYS = (signal.SIGTERM, signal.SIGINT)  # signals that interrupt, whatever was done with them before
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def select_devices(device: str, gpus: str, tensor_type: str = "", processes: Processes = ALONE) -> list[torch.device]:
    """The devices of a run, the first of which holds the model; one CPU if there is no GPU and none was insisted on.

    device: auto, cpu, cuda, cuda:N; gpus: comma-separated numbers. Of several processes on a machine each takes one of
    those GPUs, or of all of them where one alone is named. Raises UsageError for what this machine lacks.
    """
    if tensor_type == "torch.FloatTensor":
        if device not in ("auto", "cpu"):
            raise UsageError(f"--type torch.FloatTensor means the CPU, --device {device} does not: drop one")
        device = "cpu"
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    numbers = _gpu_numbers(gpus)
    if device == "cpu" or (device == "auto" and not found and numbers == [0]):
        return [torch.device("cpu")]
    if device.startswith("cuda:"):
        numbers = _gpu_numbers(device.removeprefix("cuda:"))
    elif device not in ("auto", "cuda"):
        raise UsageError(f"unknown --device {device!r}: auto, cpu, cuda or cuda:N")
    missing = [n for n in numbers if n >= found]
    if missing:
        raise UsageError(f"GPU {missing[0]} is not there: this machine has {found} CUDA GPUs, counted from 0")
    if processes.size > 1:
        numbers = numbers if len(numbers) > 1 else list(range(found))
        if processes.local_rank >= len(numbers):
            raise UsageError(
                f"no GPU for process {processes.local_rank + 1} of this machine: it may use {len(numbers)}"
            )
        numbers = [numbers[processes.local_rank]]
    torch.cuda.set_device(numbers[0])  # so that nothing opens a context on a GPU that was not asked for
    return [torch.device("cuda", n) for n in numbers]


def describe_devices(devices: Sequence[torch.device]) -> str:
    """What a run computes on, in words."""
    if devices[0].type == "cpu":
        return "the CPU" if torch.cuda.is_available() else "the CPU (no CUDA GPU was found)"
    return ", ".join(torch.cuda.get_device_name(device) for device in devices)


def _gpu_numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len(set(parts)) != len(parts):
        raise UsageError(f"GPUs are given as numbers like 0 or 0,1,2,3, not {text!r}")
    return [int(part) for part in parts]


def flush_denormals() -> None:
    """Count the tiniest numbers as zero, on the CPU: arithmetic with them is up to twenty times slower.

    Networks whose batch norms start at a gain of 1e-8 are full of them. Threads take this over from the one that starts
    them, so it comes before any computation.
    """
    for kind in (np.float32, np.float64):
        np.finfo(kind)  # some versions of NumPy look for the smallest number once, and warn if it counts as zero
    torch.set_flush_denormal(True)


def keep_memory() -> None:
    """Let the CPU's memory be used again by the process that freed it, in large pages, where the system is Linux.

    By default every large tensor is given back and comes anew, page by page, each of them zeroed: up to a fifth of a
    training step. It comes before the first tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's own setting for large pages
    try:
        allocator = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # not the GNU C library
        return
    if not allocator(M_MMAP_THRESHOLD, 2**30):
        allocator(M_MMAP_THRESHOLD, 2**25)  # the most that older ones take
    allocator(M_TRIM_THRESHOLD, 2**31 - 1)


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, NumPy, torch and CUDA; with deterministic, let no algorithm run that is not."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # setting it loads the compiler, for seconds
        torch.use_deterministic_algorithms(deterministic)


def random_state() -> dict[str, Any]:
    """The state of every random generator, of plain values and tensors, so that it loads without pickled code."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to a state of `random_state`. CUDA's is left alone where the number of GPUs is another.

    Raises UsageError for one that a generator refuses.
    """
    kind, keys, position, has_gauss, cached = state["numpy"]
    try:
        random.setstate(state["python"])
        np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"its random_state is none: {one_line(error)}") from error


@contextmanager
def name_out_of_memory() -> Iterator[None]:
    """Raise OutOfMemory where torch does not get the memory that it asks for. A context, or a decorator.

    torch has a type of its own for it on a GPU, but for the CPU, and for a GPU that is full before torch begins, words
    alone.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "out of memory" in str(error):
            raise OutOfMemory from error
        raise


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP raise KeyboardInterrupt; SIGINT also where the parent process had it ignored.

    SIGHUP, of a terminal that is closed, may come twice, from the system and from the shell. Where it is ignored, as by
    nohup, it stays so.
    """

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        if number not in ALWAYS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's alone
        yield
        return
    others = [number for number in OF_TERMINALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in {*ALWAYS, *others}}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class DelayedRead:
    """Brings a small tensor to the host without making it wait for the device."""

    def __init__(self) -> None:
        self._host: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def start(self, tensor: Tensor) -> None:
        """Begin to copy the tensor as it is now; one copy at a time, later calls are passed over until it is read."""
        if self._host is not None:
            return
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor.clone()

    def poll(self) -> list[float] | None:
        """The values if the copy has arrived, once; otherwise None."""
        if self._host is None or (self._event is not None and not self._event.query()):
            return None
        values: list[float] = self._host.tolist()
        self._host = self._event = None
        return values
