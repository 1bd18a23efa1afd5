import pytest
import torch

from biper import create_model
from biper.nn.layers import binary_layers
from biper.nn.losses import opposite, periodic_regularizer


def test_regularizer_is_the_sum_of_mean_squared_sines():
    model = create_model("resnet20_1w1a", freq=7.0)
    loss = periodic_regularizer(model, 0.5)
    other = sum((0.5 - 0.5 * torch.cos(2 * 7.0 * layer.weight)).mean() for _, layer in binary_layers(model))
    assert loss.item() == pytest.approx(0.5 * other.item(), rel=1e-5)


def test_regularizer_pulls_the_effective_weight_towards_zero():
    model = create_model("resnet20_1w1a", stage=2)
    periodic_regularizer(model, 1.0).backward()
    layer = next(binary_layers(model))[1]
    s = torch.sin(layer.weight_quantizer.freq * layer.weight.detach())
    moved = torch.sin(layer.weight_quantizer.freq * (layer.weight - 1e-4 * layer.weight.grad).detach())
    assert (moved.square().mean() < s.square().mean()).item()


def test_no_binarized_layers():
    assert periodic_regularizer(create_model("resnet20_32w32a"), 1.0).item() == 0


def test_the_opposite_is_the_sum_of_mean_squared_cosines_and_pulls_the_other_way():
    model = create_model("resnet20_1w1a", freq=7.0)
    layer = next(binary_layers(model))[1]
    loss = opposite(periodic_regularizer)(model, 0.5)
    other = sum(torch.cos(7.0 * layer.weight).square().mean() for _, layer in binary_layers(model))
    assert loss.item() == pytest.approx(0.5 * other.item(), rel=1e-5)
    loss.backward()
    pulled = layer.weight.grad.clone()
    layer.weight.grad = None
    periodic_regularizer(model, 0.5).backward()
    assert torch.equal(pulled, -layer.weight.grad)
    assert opposite(periodic_regularizer)(create_model("resnet20_32w32a"), 1.0).item() == 0
