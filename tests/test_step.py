"""When a training step is run, recorded and replayed; graphs here only note what was asked of them.

That recorded steps compute what plain ones do is shown by test_cuda.py, on a GPU.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from biper.nn.quantizers import WeightQuantizer
from biper.training.step import WARM_UP, GraphedStep, can_be_recorded

BATCH, LAST = (torch.zeros(4, 3, 2, 2), torch.zeros(4)), (torch.zeros(2, 3, 2, 2), torch.zeros(2))


@pytest.fixture
def graphed(monkeypatch):
    """A step on the CPU that notes the learning rates it sees; its graphs count their replays."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Stream": lambda device: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device: stream,
        "CUDAGraph": Graph,
        "graph": lambda graph, stream, capture_error_mode: contextlib.nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.5)
    graphed = GraphedStep(optimizer, torch.device("cpu"))
    graphed.seen = []

    def step(images, labels, weight):
        graphed.seen.append(optimizer.param_groups[0]["lr"])
        return {"loss": images.mean()}, images

    graphed.take(step)
    return graphed


class Graph:
    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


def test_a_shape_is_run_then_recorded_once_and_replayed(graphed):
    for batch in (BATCH, LAST, BATCH, BATCH, LAST, BATCH, BATCH, LAST, LAST):
        graphed(*batch, 1.0)
    assert len(graphed.seen) == 2 * (WARM_UP + 1)  # the last of which is the recording
    assert [recording.graph.replays for recording in graphed.recordings.values()] == [2, 1]


def test_what_is_replayed_finds_the_batch_and_the_learning_rate(graphed):
    (group,) = graphed.optimizer.param_groups
    for number in range(6):
        group["lr"] = 0.1 * number
        images = torch.full((4, 3, 2, 2), float(number))
        graphed(images, torch.full((4,), number), 1.0)
        assert group["lr"] == 0.1 * number
        assert graphed.rates[0] == torch.tensor(0.1 * number)
    assert all(rate is graphed.rates[0] for rate in graphed.seen)  # in warm-up too: the same bits
    (recording,) = graphed.recordings.values()
    assert torch.equal(recording.images, images)
    assert torch.equal(recording.labels, torch.full((4,), 5))


def test_another_step_is_recorded_anew(graphed):
    for _ in range(2):
        graphed.take(graphed.step)
        for _ in range(WARM_UP + 2):
            graphed(*BATCH, 1.0)
    assert len(graphed.seen) == 2 * (WARM_UP + 1)
    assert len(graphed.recordings) == 1


def test_where_it_fails_one_line_says_so_and_every_step_is_run(graphed, monkeypatch, caplog):
    @contextlib.contextmanager
    def failing(graph, stream, capture_error_mode):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nand so on")

    monkeypatch.setattr(torch.cuda, "graph", failing)
    for _ in range(2):
        graphed.take(graphed.step)
        for _ in range(WARM_UP + 2):
            graphed(*BATCH, 1.0)
    assert len(graphed.seen) == 2 * (WARM_UP + 2) + 1  # one of them was to be recorded
    assert graphed.optimizer.param_groups[0]["lr"] == 0.5
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("CUDA graphs do not work here: going on without them (operation not permitted")


class Number(WeightQuantizer):
    def set_progress(self, progress):
        self.progress = progress


def test_what_can_be_recorded():
    network = torch.nn.Linear(2, 2)
    fused = torch.optim.SGD(network.parameters(), 0.1, fused=True)
    assert can_be_recorded(network, fused)
    assert not can_be_recorded(torch.nn.Sequential(network, Number()), fused)
    assert not can_be_recorded(network, torch.optim.SGD(network.parameters(), 0.1))
    assert not can_be_recorded(network, torch.optim.AdamW(network.parameters(), 0.1, fused=True))
