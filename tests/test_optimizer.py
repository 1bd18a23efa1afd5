import pytest
import torch
from torch import nn

from biper import create_model
from biper.models import list_models
from biper.models.blocks import without_weight_decay
from biper.nn.layers import BinaryConv2d
from biper.training.optimizer import Factors, build_optimizer, load_optimizer, parameter_groups, set_learning_rate

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def build(name):
    model = create_model("resnet20_1w1a")
    return build_optimizer(model, family="cifar10", name=name, lr=0.1, momentum=0.9, weight_decay=5e-4)


@pytest.mark.parametrize(("name", "kind"), OPTIMIZERS.items())
def test_every_parameter_decays(name, kind):
    optimizer = build(name)
    assert isinstance(optimizer, kind)
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 5e-4
    assert sum(p.numel() for p in group["params"]) == 270_522


def test_sgd_has_momentum():
    assert build("sgd").param_groups[0]["momentum"] == 0.9


def test_alpha_and_the_biases_of_norms_may_have_learning_rates_of_their_own():
    model = create_model("resnet20_1w1a")
    factors = Factors(alpha=0.5, norm_bias=3.0)
    options = {"family": "cifar10", "name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    optimizer = build_optimizer(model, **options, factors=factors, nesterov=True)
    set_learning_rate(optimizer, 0.2)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    found = {name: rates[parameter] for name, parameter in model.named_parameters()}
    for name, rate in found.items():
        alpha, bias = name.endswith("alpha"), "bn" in name and name.endswith("bias")
        assert rate == pytest.approx(0.1 if alpha else 0.6 if bias else 0.2), name
    assert optimizer.param_groups[0]["lr"] == 0.2  # which the log shows
    again = build_optimizer(model, **options, factors=factors)
    load_optimizer(again, optimizer.state_dict())
    assert [group["lr"] for group in again.param_groups] == [group["lr"] for group in optimizer.param_groups]


def test_unknown_name():
    with pytest.raises(ValueError, match="sgd, adam, adamw"):
        build("lamb")


def published_rule(name):
    """The published code's, which goes by a parameter's name."""
    return name.rsplit(".", 2)[-2].startswith(("conv", "fc"))


@pytest.mark.parametrize("name", list_models("imagenet"))
def test_of_imagenet_networks_decays_what_the_published_code_names(name):
    model = create_model(name, family="imagenet", num_classes=3)
    decayed, kept = parameter_groups(model, "imagenet", 1e-4)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (1e-4, 0.0)
    names = {parameter: key for key, parameter in model.named_parameters()}
    assert [names[p] for p in decayed["params"]] == [n for n in names.values() if published_rule(n)]
    assert [names[p] for p in kept["params"]] == [n for n in names.values() if not published_rule(n)]


class OtherNames(nn.Module):
    """Layers of other names than the published ones, and parameters of the model itself."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))
        self.stem = nn.Conv2d(3, 16, 3)
        self.convolved_norm = nn.BatchNorm2d(16)
        self.binary = BinaryConv2d(16, 16, 3)
        self.norm = nn.GroupNorm(2, 16)
        self.head = nn.Linear(16, 3)


def test_the_kind_of_the_layer_decides_not_its_name():
    model = OtherNames()
    decayed, kept = parameter_groups(model, "imagenet", 1e-4)
    names = {parameter: key for key, parameter in model.named_parameters()}
    layers = ["stem.weight", "stem.bias", "binary.weight", "binary.alpha", "head.weight", "head.bias"]
    norms = ["convolved_norm.weight", "convolved_norm.bias", "norm.weight", "norm.bias"]
    assert {names[p] for p in decayed["params"]} == set(layers)
    assert [names[p] for p in kept["params"]] == ["temperature", *norms]


def test_an_architecture_can_leave_a_layer_out():
    model = OtherNames()
    without_weight_decay(model.head)
    decayed, _ = parameter_groups(model, "imagenet", 1e-4)
    assert not {model.head.weight, model.head.bias} & set(decayed["params"])


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_state_of_another_memory_format_is_taken_over(name):
    """Fused optimizers walk through memory: a momentum laid out otherwise would go to other weights, silently."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        saved = None
        for memory_format in (torch.contiguous_format, layout):
            layer = nn.Conv2d(4, 8, 3).to(memory_format=memory_format)
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


@pytest.mark.parametrize("family", ["cifar10", "imagenet"])
def test_learned_thresholds_slopes_and_shifts_do_not_decay(family):
    model = create_model("resnet18_react_1w1a", family=family)
    learned = {p for n, p in model.named_parameters() if "input_quantizer" in n or "activation" in n}
    assert len(learned) == 16 + 3 * 16 + (3 if family == "cifar10" else 0)  # CIFAR's stem has an activation
    still = {p for group in parameter_groups(model, family, 0.1) if not group["weight_decay"] for p in group["params"]}
    assert learned <= still
