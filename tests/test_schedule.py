import math

import pytest

from biper.training.schedule import lr_at, tau_at


def test_warm_up_rises_in_fifths_and_meets_the_cosine():
    rates = [lr_at(e, lr=0.5, epochs=20, warm_up=True) for e in range(6)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates[5] == pytest.approx(0.25 * (1 + math.cos(math.pi / 16)))


def test_cosine():
    assert lr_at(0, lr=0.1, epochs=10) == pytest.approx(0.1)
    assert lr_at(5, lr=0.1, epochs=10) == pytest.approx(0.05)
    assert lr_at(12, lr=0.1, epochs=20, warm_up=True) == pytest.approx(0.05)


def test_step():
    rates = [lr_at(e, lr=1.0, epochs=10, lr_type="step", lr_decay_step=(3, 6)) for e in (2, 3, 6)]
    assert rates == pytest.approx([1, 0.1, 0.01])


def test_linear_counts_the_warm_up_once():
    rates = [lr_at(e, lr=1.0, epochs=8, lr_type="linear", warm_up=True) for e in range(4, 8)]
    assert rates == pytest.approx([1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("lr_type", ["cos", "linear"])
def test_runs_shorter_than_the_warm_up(epochs, lr_type):
    assert all(0 < lr_at(e, lr=1.0, epochs=epochs, lr_type=lr_type, warm_up=True) <= 1 for e in range(epochs))


def test_one_cycle():
    cycle = {"lr": 2.0, "epochs": 20, "lr_type": "onecycle", "lr_peak": 0.25}
    assert [lr_at(e, **cycle) for e in (0, 5, 20)] == pytest.approx([0.08, 2.0, 8e-6])
    assert lr_at(2.5, **cycle) == pytest.approx(1.04)  # half-way up
    assert lr_at(12.5, **cycle) == pytest.approx(1.000004)


def test_triangular():
    cycle = {"lr": 1.0, "epochs": 10, "lr_type": "triangular", "lr_peak": 0.4}
    assert [lr_at(e, **cycle) for e in (0, 2, 4, 7, 10)] == pytest.approx([0.04, 0.52, 1.0, 0.5, 0.0])


def test_unknown_type():
    with pytest.raises(ValueError, match="cos, step, linear, onecycle, triangular"):
        lr_at(0, lr=1.0, epochs=2, lr_type="exp")


def test_tau():
    values = [tau_at(e, epochs=10, tau_min=0.85, tau_max=0.99) for e in (0, 5, 10)]
    middle = 0.85 + 0.14 * (math.exp(0.5) - 1) / (math.e - 1)
    assert values == pytest.approx([0.85, middle, 0.99])
    assert tau_at(7, epochs=10, tau_min=0.037, tau_max=0.037) == pytest.approx(0.037)


def test_warm_up_of_another_length():
    rates = [lr_at(e, lr=1.0, epochs=12, warm_up=True, warm_up_epochs=2) for e in range(3)]
    assert rates == pytest.approx([0.5, 1.0, 0.5 * (1 + math.cos(math.pi / 11))])
    assert lr_at(0, lr=1.0, epochs=9, warm_up=True, warm_up_epochs=1) == lr_at(0, lr=1.0, epochs=9)
