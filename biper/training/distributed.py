"""Several processes that train together, as torchrun starts them. With one process everything here does nothing.

Functions named after a collective operation (all_reduce, broadcast, all_gather) must be called by every process.
"""

import inspect
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from biper.errors import ProcessLost, UsageError, one_line

PATIENCE = timedelta(minutes=10)
POLL, SETTLE = 0.05, 0.3  # seconds
LOST = ("gloo", "Connection closed by peer", "Connection reset by peer")  # of a process that is gone, as gloo says it
BACKEND = "cpu:gloo,cuda:nccl"  # each tensor goes the way of its device; flags and texts go over the CPU


@dataclass(frozen=True)
class Processes:
    """This process's place: its rank of `size` in all, and its rank among those of this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0


def launched_processes(environment: Mapping[str, str] = os.environ) -> Processes:
    """This process's place as torchrun tells it; alone if nothing did."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in environment for name in names):
        return Processes()
    return Processes(*(int(environment[name]) for name in names))


def launched_by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in environment


def restartable(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun starts the processes again after a failure.

    It does not tell every machine that it has: where another one failed, the count of restarts stays what it was.
    """
    return int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


@contextmanager
def joined(processes: Processes) -> Iterator[None]:
    """Join the other processes, and leave them at the end. Raises UsageError if they cannot be reached."""
    if processes.size == 1:
        yield
        return
    backend = BACKEND if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        store.set_timeout(PATIENCE)
        dist.init_process_group(backend, store=fresh_store(store, rank, size), rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"cannot join the other processes ({one_line(error)}): start with torchrun") from error
    try:
        yield
    finally:
        # gloo's threads let go of the last tensors, for which they need Python's lock: whoever destroys the group, or
        # the model that holds it, joins them with the lock held, and would wait for ever [seen with torch 2.6]
        time.sleep(SETTLE)
    dist.destroy_process_group()  # not after an error: it could wait for processes that are gone


def fresh_store(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of the launcher's store that belongs to these very processes.

    The launcher keeps one store over its restarts, in which a new process would find the addresses of dead ones. So the
    first process lists a token of every process, asks for them again until each has found itself on the list and said
    so, and they go on below a name that the first one made. [seen with torch 2.15]
    """
    token, deadline = uuid4().hex, time.monotonic() + PATIENCE.total_seconds()
    name = "" if rank else token
    while time.monotonic() < deadline:
        if rank == 0:
            if store.check([f"biper/seen/{name}/{other}" for other in range(1, size)]):
                return dist.PrefixStore(name, store)
            tokens = [store.get(f"biper/token/{other}").decode() for other in range(1, size)]
            store.set("biper/list", " ".join([name, *tokens]))
        else:
            store.set(f"biper/token/{rank}", token)
            name, *tokens = store.get("biper/list").decode().split()
            if len(tokens) == size - 1 and tokens[rank - 1] == token:
                store.set(f"biper/seen/{name}/{rank}", "")
                return dist.PrefixStore(name, store)
        time.sleep(POLL)
    raise RuntimeError(f"not all of {size} processes came within {PATIENCE}")


def joint() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized()


@contextmanager
def collective() -> Iterator[None]:
    """Raise ProcessLost where a collective operation fails: whoever took part in it is no longer there."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ProcessLost(one_line(error)) from error


@contextmanager
def step_of_replicas() -> Iterator[None]:
    """Raise ProcessLost where a step of a `replicated` network fails because another process is gone.

    The network's own errors pass as they are. NCCL's errors have a type, gloo's have their words alone.
    """
    try:
        yield
    except dist.DistError as error:
        raise ProcessLost(one_line(error)) from error
    except RuntimeError as error:
        if joint() and any(words in str(error) for words in LOST):
            raise ProcessLost(one_line(error)) from error
        raise


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in each of them."""
    if joint():
        tensor = tensor.clone()
        with collective():
            dist.all_reduce(tensor)
    return tensor


def broadcast_decision(value: bool) -> bool:
    """What the first process says, in all of them; no device waits for it."""
    if not joint():
        return value
    told = torch.tensor([value])
    with collective():
        dist.broadcast(told, 0)
    return bool(told.item())


def all_gather_equal(value: Any, what: str) -> None:  # noqa: ANN401
    """Raise UsageError in every process unless all of them bring the same value."""
    if not joint():
        return
    values: list[Any] = [None] * dist.get_world_size()
    with collective():
        dist.all_gather_object(values, value)
    if any(other != values[0] for other in values):
        raise UsageError(f"the processes disagree about {what}: {values}; results_dir must be one folder for all")


def replicated(network: nn.Module) -> DistributedDataParallel:
    """The network with gradients averaged over the processes; batch norm's statistics stay each process's own."""
    # torch has renamed the option, and warns of the old name
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    with collective():  # it compares the networks, and gives all of them the first one's weights
        return DistributedDataParallel(network, **options)


@torch.no_grad()
def all_reduce_buffers(model: nn.Module) -> None:
    """Set every floating buffer (batch norm's statistics) to its mean over the processes."""
    if joint():
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        flat = all_reduce_sum(torch.cat([buffer.flatten() for buffer in buffers])) / dist.get_world_size()
        for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))
