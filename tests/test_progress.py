"""A quantizer that changes over training: told how much is done, resumed exactly, loaded as it was saved."""

import pytest
import torch
from conftest import TINY

from biper import create_model, load_checkpoint, pack
from biper.nn.quantizers import WEIGHT_QUANTIZERS, WeightQuantizer, register_quantizer
from biper.training import build
from biper.training import trainer as trainers
from biper.training.checkpoint import BEST, LATEST


class Annealed(WeightQuantizer):
    """sign(w), whose gradient is that of tanh(k*w) with k from 1 to 10; at the end weights below 0.01 become +1."""

    def __init__(self, last=10.0):
        super().__init__()
        self.last = last
        self.register_buffer("k", torch.ones(()), persistent=False)
        self.told = []

    def set_progress(self, progress):
        self.told.append(progress)
        self.k.fill_(self.last**progress)

    def forward(self, w):
        soft = torch.tanh(self.k * w)
        return torch.where(w >= 0.01 - 0.001 * self.k, 1.0, -1.0) + (soft - soft.detach())


@pytest.fixture
def annealed(monkeypatch):
    """Trainings of networks with that quantizer, as `--dataset` and the other flags say."""
    monkeypatch.setattr("biper.nn.quantizers.WEIGHT_QUANTIZERS", WEIGHT_QUANTIZERS)
    register_quantizer("annealed")(Annealed)
    made = []

    def initial_network(settings, num_classes):
        model = create_model(settings.model, num_classes=num_classes, weight_quantizer=Annealed())
        made.append(model.layer1[0].conv1.weight_quantizer)
        return model

    monkeypatch.setattr(build, "initial_network", initial_network)
    yield made
    del WEIGHT_QUANTIZERS["annealed"]


def test_it_is_told_the_progress_and_resumes_exactly(annealed, command, monkeypatch, tmp_path):
    flags = [*TINY, "--epochs", 3, "--no-regularizer", "--from_scratch"]
    assert command(*flags, "--results_dir", tmp_path / "whole", stage=2)[0] == 0
    assert annealed[0].told == pytest.approx(
        [step / 18 for epoch in range(3) for step in range(6 * epoch, 6 * epoch + 7)]
    )

    save = trainers.save_checkpoint

    def stopping(contents, path):
        save(contents, path)
        if contents["epoch"] == 2:
            raise KeyboardInterrupt("SIGINT")

    monkeypatch.setattr(trainers, "save_checkpoint", stopping)
    assert command(*flags, "--results_dir", tmp_path / "run", stage=2)[0] == 130
    monkeypatch.setattr(trainers, "save_checkpoint", save)
    code, _, err = command(*flags, "--results_dir", tmp_path / "run", "--resume", stage=2)
    assert code == 0, err
    whole, resumed = (torch.load(tmp_path / name / LATEST, weights_only=True) for name in ("whole", "run"))
    assert whole["history"] == resumed["history"]
    assert whole["progress"] == resumed["progress"] == 1
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], tensor), name


def test_a_checkpoint_is_evaluated_and_packed_as_it_was_when_it_was_saved(annealed, command, tmp_path):
    flags = [*TINY, "--epochs", 2, "--no-regularizer", "--from_scratch", "--results_dir", tmp_path / "run"]
    assert command(*flags, stage=2)[0] == 0
    contents = torch.load(tmp_path / "run" / BEST, weights_only=True)
    network = load_checkpoint(tmp_path / "run" / BEST)
    assert network.metadata.weight_quantizer == {"name": "annealed", "last": 10.0}
    quantizer = network.layer1[0].conv1.weight_quantizer
    assert quantizer.k.item() == pytest.approx(10 ** contents["progress"])
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(pack(network)(x), network(x))
    code, out, err = command("-e", tmp_path / "run" / BEST, family=None, stage=None)
    assert code == 0, err
    assert f"top-1 {contents['history'][contents['epoch'] - 1]['test_top1']:.2f} %" in out
