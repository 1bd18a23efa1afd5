import os
import random
import signal

import numpy as np
import pytest
import torch

from biper.errors import OutOfMemory, UsageError
from biper.training.process import (
    name_out_of_memory,
    random_state,
    seed_everything,
    select_devices,
    set_random_state,
    signals_interrupt,
)


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n): this machine has n CUDA GPUs."""

    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda n: None)

    return pretend


def test_without_a_gpu(gpus):
    gpus(0)
    cpu = [torch.device("cpu")]
    assert select_devices("auto", "0") == cpu
    assert select_devices("cpu", "0") == cpu
    assert select_devices("auto", "0", "torch.FloatTensor") == cpu
    for device, numbers in (("auto", "7"), ("auto", "0,1"), ("cuda", "0"), ("cuda:1", "0")):
        with pytest.raises(UsageError, match="this machine has 0 CUDA GPUs"):
            select_devices(device, numbers)


def test_with_gpus(gpus):
    gpus(2)
    assert select_devices("auto", "0") == [torch.device("cuda:0")]
    assert select_devices("auto", "1,0") == [torch.device("cuda:1"), torch.device("cuda:0")]
    assert select_devices("cuda:1", "0") == [torch.device("cuda:1")]
    assert select_devices("cpu", "0,1") == [torch.device("cpu")]
    with pytest.raises(UsageError, match="GPU 7 is not there"):
        select_devices("auto", "7")


@pytest.mark.parametrize(
    ("device", "numbers", "kind"),
    [("tpu", "0", ""), ("auto", "a", ""), ("auto", "", ""), ("auto", "0,0", ""), ("cuda", "0", "torch.FloatTensor")],
)
def test_nonsense(device, numbers, kind):
    with pytest.raises(UsageError):
        select_devices(device, numbers, kind)


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_random_state_goes_through_a_file(tmp_path):
    seed_everything(3, deterministic=False)
    draw()
    torch.save(random_state(), tmp_path / "state")
    expected = draw()
    seed_everything(4, deterministic=False)
    assert draw() != expected
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected


def test_deterministic_mode():
    seed_everything(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    seed_everything(0, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def default_signals():
    """Signals have their default handlers, also where this was started by nohup."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_signals")
def test_a_terminal_that_is_closed_is_heeded_once_and_not_where_it_was_ignored():
    with signals_interrupt():
        with pytest.raises(KeyboardInterrupt, match="SIGHUP"):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals_interrupt():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_become_keyboard_interrupts(number):
    def interrupted():
        with signals_interrupt():
            os.kill(os.getpid(), number)
            signal.pause()

    with pytest.raises(KeyboardInterrupt, match=signal.Signals(number).name):
        interrupted()
    assert signal.getsignal(number) is signal.SIG_DFL


def test_memory_that_torch_does_not_get():
    with pytest.raises(OutOfMemory, match="give a smaller -b"), name_out_of_memory():
        torch.empty(2**50)
    with pytest.raises(OutOfMemory), name_out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(RuntimeError, match="size of tensor"), name_out_of_memory():
        torch.ones(2) + torch.ones(3)
