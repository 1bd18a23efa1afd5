import pytest
import torch

from biper import create_model
from biper.optim import build_optimizer


def build(name):
    return build_optimizer(create_model("resnet20_1w1a"), name=name, lr=0.1, momentum=0.9, weight_decay=5e-4)


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_every_parameter_decays(name, kind):
    optimizer = build(name)
    assert isinstance(optimizer, kind)
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 5e-4
    assert sum(p.numel() for p in group["params"]) == 270_522


def test_sgd_has_momentum():
    assert build("sgd").param_groups[0]["momentum"] == 0.9


def test_unknown_name():
    with pytest.raises(ValueError, match="sgd, adam"):
        build("lamb")
