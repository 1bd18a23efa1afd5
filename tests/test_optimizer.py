import pytest
import torch

from biper import create_model
from biper.training.optimizer import build_optimizer, load_optimizer, parameter_groups


def build(name):
    model = create_model("resnet20_1w1a")
    return build_optimizer(model, family="cifar10", name=name, lr=0.1, momentum=0.9, weight_decay=5e-4)


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


DECAY = {  # a parameter's name, and whether it decays
    "resnet18_1w1a": {
        "conv1.weight": True,
        "bn1.weight": False,
        "layer2.0.conv1.weight": True,
        "layer2.0.conv1.alpha": True,
        "layer2.0.bn1.bias": False,
        "layer2.0.downsample.0.weight": False,
        "layer2.0.downsample.1.weight": False,
        "bn2.weight": False,
        "fc.weight": True,
        "fc.bias": True,
    },
    "mobilenet_1w1a": {"model.0.0.weight": False, "model.1.conv3.alpha": True, "model.1.bn3.weight": False},
}


@pytest.mark.parametrize("name", DECAY)
def test_of_imagenet_networks_only_layers_named_conv_and_fc_decay(name):
    model = create_model(name, "imagenet", num_classes=3)
    decayed, kept = parameter_groups(model, "imagenet", 1e-4)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (1e-4, 0.0)
    inside = {id(p) for p in decayed["params"]}
    parameters = dict(model.named_parameters())
    assert {key: id(parameters[key]) in inside for key in DECAY[name]} == DECAY[name]
    assert len(decayed["params"]) + len(kept["params"]) == len(parameters)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_state_of_another_memory_format_is_taken_over(name):
    """Fused optimizers walk through memory: a momentum laid out otherwise would go to other weights, silently."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        saved = None
        for memory_format in (torch.contiguous_format, layout):
            layer = torch.nn.Conv2d(4, 8, 3).to(memory_format=memory_format)
            with torch.no_grad():
                layer.weight.copy_(torch.arange(288.0).view(8, 4, 3, 3))
            settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
            optimizer = build_optimizer(layer, family="cifar10", name=name, **settings)
            if saved:
                load_optimizer(optimizer, saved)
                for group in optimizer.param_groups:
                    group["fused"] = True
            layer.weight.grad = torch.sin(layer.weight.detach())
            layer.bias.grad = torch.zeros_like(layer.bias)
            optimizer.step()
            saved = optimizer.state_dict()
        results.append(layer.weight.detach())
    torch.testing.assert_close(*results)
