"""Moving averages of a network under training (--ema)."""

import pytest
import torch
from conftest import TINY
from torch import nn

from biper.models.checkpoint import read_checkpoint
from biper.nn.layers import BinaryConv2d
from biper.training.averaging import MovingAverage
from biper.training.checkpoint import BEST


def test_the_average_is_the_sum_of_what_was_by_decaying_weights():
    torch.manual_seed(0)
    network = nn.Sequential(BinaryConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    average = MovingAverage(network, 0.5)
    alpha, norm = ["0.alpha"], ["1.weight", "1.bias", "1.running_mean", "1.running_var"]
    assert average.names == [*alpha, *norm, "3.weight", "3.bias"]  # neither the weights that become binary nor counts
    state = network.state_dict()
    expected = {name: state[name].double() for name in average.names}
    for step in range(1, 12):
        with torch.no_grad():
            for name in average.names:
                state[name].add_(torch.randn_like(state[name]))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name in average.names:
            expected[name] = decay * expected[name] + (1 - decay) * state[name].double()
    live, kept = {name: state[name].clone() for name in average.names}, state["0.weight"].clone()
    with average.shown():
        for name in average.names:
            torch.testing.assert_close(network.state_dict()[name].double(), expected[name], rtol=1e-5, atol=1e-5)
            assert torch.equal(average.hidden()[name], live[name])
        assert torch.equal(network.state_dict()["0.weight"], kept)
    assert all(torch.equal(network.state_dict()[name], live[name]) for name in average.names)


def test_what_is_there_twice_is_averaged_once():
    layer, norm = BinaryConv2d(4, 4, 1), nn.BatchNorm2d(4)
    network = nn.Sequential(layer, norm, layer, norm)
    average = MovingAverage(network, 0.5)
    assert average.names == ["0.alpha", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        norm.weight.fill_(3)
    average.update(1)
    with average.shown():
        torch.testing.assert_close(norm.weight, 3 - 2 * (2 / 11) * before["1.weight"])
    assert torch.equal(norm.weight, torch.full((4,), 3.0))


def test_the_average_is_what_is_evaluated_saved_and_taken_up(command, tmp_path):
    flags = [*TINY, "--epochs", 2, "--ema", 0.8, "--results_dir", tmp_path]
    assert command(*flags)[0] == 0
    saved = read_checkpoint(tmp_path / BEST)
    state, training = saved["state_dict"], saved["not_averaged"]
    assert not any(torch.equal(state[name], tensor) for name, tensor in training.items())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.alpha", "linear.weight"} <= set(training)
    assert "layer1.0.conv1.weight" not in training
    code, out, _ = command("-e", tmp_path / BEST, family=None)
    assert code == 0
    assert f"{saved['best_prec1']:.2f} %" in out


CASES = [
    (1, "1.0 is too large: below 1"),
    (-0.1, "-0.1 is too small: at least 0"),
    ("nan", "nan is not a finite number"),
]


@pytest.mark.parametrize(("decay", "message"), CASES)
def test_bad_input(decay, message, refused, tmp_path):
    assert f"--ema {message}" in refused(*TINY, "--ema", decay, "--results_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()
