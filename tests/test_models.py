import json
from pathlib import Path

import pytest
import torch
from torch import nn

from biper import BinaryConv2d, create_model, list_models
from biper.models.cifar_resnet import match_shape
from biper.models.registry import register

PUBLISHED = json.loads((Path(__file__).parent / "parity" / "state_dict_keys.json").read_text())["cifar10"]
PARAMETERS = {
    "resnet20_1w1a": 270_522,
    "resnet20_1w32a": 270_522,
    "resnet18_1w1a": 11_005_002,
    "resnet18A_1w1a": 724_394,
    "resnet18B_1w1a": 2_756_138,
    "resnet18C_1w1a": 2_886_474,
    "vgg_small_1w1a": 4_661_770,
}


@pytest.mark.parametrize("name", list_models())
def test_every_model_learns_from_a_batch(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=7, stage=2)
    images = torch.randn(2, 3, 32, 32)
    loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 6]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith("conv1.weight"))
    with torch.inference_mode():
        assert model.eval()(images[:1]).shape == (1, 7)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    assert sum(p.numel() for p in create_model(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(name):
    ours = {key: list(tensor.shape) for key, tensor in create_model(name).state_dict().items()}
    assert ours == {k: v for k, v in PUBLISHED[name].items() if not k.endswith((".beta", ".tau"))}


def test_precisions():
    one_bit, real_a, twin = (create_model(f"resnet18_{p}") for p in ("1w1a", "1w32a", "32w32a"))
    assert all(m.binary_activations for m in one_bit.modules() if isinstance(m, BinaryConv2d))
    assert not any(m.binary_activations for m in real_a.modules() if isinstance(m, BinaryConv2d))
    assert not any(isinstance(m, BinaryConv2d) for m in twin.modules())
    assert real_a.layer1[0].activation is nn.functional.relu
    assert twin.layer1[0].activation is one_bit.layer1[0].activation is nn.functional.hardtanh
    assert set(twin.state_dict()) == {k for k in one_bit.state_dict() if not k.endswith("alpha")}


@pytest.mark.parametrize("name", ["resnet20_1w1a", "resnet18A_1w1a"])
def test_resnets_take_any_image_size(name):
    model = create_model(name).eval()
    assert [model(torch.randn(1, 3, s, s)).shape for s in (8, 15, 64)] == [(1, 10)] * 3


def test_vgg_refuses_other_image_sizes():
    with pytest.raises(ValueError, match="32x32 images, not 16x16"):
        create_model("vgg_small_1w1a")(torch.randn(2, 3, 16, 16))


def test_match_shape_pools_and_adds_zero_channels_on_both_sides():
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    y = match_shape(x, 4, 2)
    assert y.shape == (1, 4, 2, 2)
    assert y[:, [0, 3]].abs().sum() == 0
    torch.testing.assert_close(y[:, 1:3], nn.functional.avg_pool2d(x, 2))


def test_initialization():
    torch.manual_seed(0)
    resnet, vgg = create_model("resnet18_1w1a"), create_model("vgg_small_1w1a")
    assert resnet.layer3[0].conv1.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.01)
    assert vgg.conv4.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    assert vgg.fc.weight.std().item() == pytest.approx(0.01, rel=0.01)


def test_metadata():
    m = create_model("resnet20_1w1a", num_classes=3, freq=12.0, stage=2).metadata
    assert (m.model, m.family, m.num_classes, m.freq, m.stage) == ("resnet20_1w1a", "cifar10", 3, 12.0, 2)


def test_errors_name_the_choices():
    with pytest.raises(ValueError, match=r"unknown model 'resnet19_1w1a'; choose from .*resnet20_1w1a"):
        create_model("resnet19_1w1a")
    with pytest.raises(ValueError, match="unknown family 'mnist'; choose from cifar10"):
        list_models("mnist")
    with pytest.raises(ValueError, match="already has"):
        register("cifar10", "resnet20")(lambda *_: None)
