import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn

from biper import BinaryConv2d, PolynomialSign, Sign, binarize_, create_model, list_models, load_checkpoint
from biper.errors import UsageError
from biper.models.cifar_resnet import match_shape
from biper.models.metadata import metadata_from
from biper.models.registry import register_model
from biper.training.settings import make_settings

PUBLISHED = json.loads((Path(__file__).parent / "parity" / "state_dict_keys.json").read_text())
CLASSES = {"cifar10": 10, "imagenet": 1000}
MODELS = [(family, name) for family in CLASSES for name in list_models(family)]
PARAMETERS = {
    ("cifar10", "resnet20_1w1a"): 270_522,
    ("cifar10", "resnet20_1w32a"): 270_522,
    ("cifar10", "resnet18_1w1a"): 11_005_002,
    ("cifar10", "resnet18A_1w1a"): 724_394,
    ("cifar10", "resnet18B_1w1a"): 2_756_138,
    ("cifar10", "resnet18C_1w1a"): 2_886_474,
    ("cifar10", "vgg_small_1w1a"): 4_661_770,
    ("imagenet", "resnet18_1w1a"): 11_694_376,
    ("imagenet", "resnet34_1w1a"): 21_806_248,
    ("imagenet", "mobilenet_1w1a"): 8_768_296,
}


@pytest.mark.parametrize(("family", "name"), MODELS)
def test_every_model_learns_from_a_batch(family, name):
    torch.manual_seed(0)
    model = create_model(name, family=family, num_classes=7, stage=2)
    for module in model.modules():  # ImageNet's gains of 1e-8 leave gradients that underflow
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    images = torch.randn(2, 3, 32, 32)
    loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 6]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith("conv1.weight"))
    with torch.inference_mode():
        assert model.eval()(images[:1]).shape == (1, 7)


@pytest.mark.parametrize(("family", "name"), PARAMETERS)
def test_parameters(family, name):
    model = create_model(name, family=family, num_classes=CLASSES[family])
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[family, name]


@pytest.mark.parametrize(("family", "name"), [(f, name) for f, names in PUBLISHED.items() for name in names])
def test_names_and_shapes_are_the_published_ones(family, name):
    model = create_model(name, family=family, num_classes=CLASSES[family])
    ours = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert ours == {k: v for k, v in PUBLISHED[family][name].items() if not k.endswith((".beta", ".tau"))}


def test_precisions():
    one_bit, real_a, twin = (create_model(f"resnet18_{p}") for p in ("1w1a", "1w32a", "32w32a"))
    assert all(m.input_quantizer is not None for m in one_bit.modules() if isinstance(m, BinaryConv2d))
    assert not any(m.input_quantizer is not None for m in real_a.modules() if isinstance(m, BinaryConv2d))
    assert not any(isinstance(m, BinaryConv2d) for m in twin.modules())
    assert type(real_a.layer1[0].activation1) is nn.ReLU
    assert type(twin.layer1[0].activation2) is type(one_bit.layer1[0].activation2) is nn.Hardtanh
    assert set(twin.state_dict()) == {k for k in one_bit.state_dict() if not k.endswith("alpha")}


@pytest.mark.parametrize(
    ("family", "name"),
    [("cifar10", "resnet20_1w1a"), ("cifar10", "resnet18A_1w1a"), ("imagenet", "resnet18_1w1a")]
    + [("imagenet", f"mobilenet_{precision}") for precision in ("1w1a", "32w32a")],
)
def test_networks_take_any_image_size(family, name):
    model = create_model(name, family=family, num_classes=10).eval()
    assert [model(torch.randn(1, 3, s, s)).shape for s in (8, 15, 64)] == [(1, 10)] * 3


def test_imagenet_resnet_begins_as_published():
    """Every BatchNorm2d, the downsampling branch's included, at 1e-8; the head's BatchNorm1d at 1."""
    model = create_model("resnet18_1w1a", family="imagenet")
    gains = {name: m.weight.unique().tolist() for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(gains) == 1 + 16 + 3
    assert all(gain == [pytest.approx(1e-8)] for gain in gains.values())
    assert model.bn2.weight.unique().tolist() == [1.0]
    stem, binary = model.conv1, model.layer3[0].conv2
    for layer, fan_in in ((stem, 3 * 49), (binary, 256 * 9), (model.layer2[0].downsample[0], 64)):
        assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.03)


def test_imagenet_stems_and_downsampling_are_real():
    for name, binary in (("resnet18_1w1a", 16), ("resnet34_1w1a", 32), ("mobilenet_1w1a", 39)):
        layers = [m for m in create_model(name, family="imagenet").modules() if isinstance(m, nn.Conv2d)]
        assert sum(isinstance(m, BinaryConv2d) for m in layers) == binary
        assert all(m.kernel_size in ((3, 3), (1, 1)) for m in layers if isinstance(m, BinaryConv2d))
    groups = {m.in_channels // m.groups for m in layers if m.kernel_size == (3, 3) and isinstance(m, BinaryConv2d)}
    assert groups == {16}
    for name in list_models("imagenet"):  # a batch norm follows each
        convs = [m for m in create_model(name, family="imagenet").modules() if isinstance(m, nn.Conv2d)]
        assert all(m.bias is None for m in convs)


def test_vgg_refuses_other_image_sizes():
    with pytest.raises(ValueError, match="32x32 images, not 16x16"):
        create_model("vgg_small_1w1a")(torch.randn(2, 3, 16, 16))


def test_match_shape_pools_and_adds_zero_channels_on_both_sides():
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    y = match_shape(x, missing=2, stride=2)
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
    assert create_model("resnet20_1w1a", num_classes=1).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 1)
    assert create_model("resnet18_1w1a", family="imagenet").metadata.shown_size == 224
    m = create_model("resnet20_1w1a", num_classes=3, freq=12.0, stage=2).metadata
    assert m.shown_size == 32
    assert (m.model, m.family, m.num_classes, m.freq, m.stage) == ("resnet20_1w1a", "cifar10", 3, 12.0, 2)


def test_metadata_follow_the_layers():
    model = create_model("resnet20_1w1a", freq=12.0)
    assert model.metadata.stage == 1
    binarize_(model)
    assert (model.metadata.stage, model.metadata.freq) == (2, 12.0)
    assert metadata_from(model.metadata.to_plain()) == model.metadata
    old = model.metadata.to_biper()
    assert (old["freq"], old["stage"]) == (12.0, 2)
    assert metadata_from(old) == model.metadata
    other = create_model("resnet20_1w1a", weight_quantizer=Sign(), input_quantizer=PolynomialSign(standardized=False))
    assert other.metadata.to_biper() is None
    assert other.metadata.freq is None
    assert other.metadata.quantizer_text == "sign, inputs polynomial_sign (standardized False)"
    assert metadata_from(other.metadata.to_plain()) == other.metadata
    assert create_model("resnet20_1w32a").metadata.input_quantizer is None


def test_one_list_of_all_families_and_each_familys_classes():
    assert set(list_models()) == set(list_models("cifar10")) | set(list_models("imagenet"))
    assert create_model("mobilenet_1w1a").metadata.family == "imagenet"
    assert create_model("mobilenet_32w32a").fc.out_features == 1000
    assert create_model("resnet18_1w1a", family="imagenet").fc.out_features == 1000
    assert create_model("resnet18_1w1a").linear.out_features == 10


def test_the_default_frequency_is_the_flags():
    freq = create_model("resnet20_1w1a").metadata.freq
    assert freq == make_settings("cifar10", 1, {}).freq == BinaryConv2d(1, 1, 1).weight_quantizer.freq == 30


def test_weights_that_come_with_biper_and_those_of_a_file():
    path = ROOT / "pretrained_models" / "resnet20_1w1a" / "model.pth.tar"
    x = torch.randn(2, 3, 32, 32)
    expected = load_checkpoint(path)(x)
    for model in (create_model("resnet20_1w1a", pretrained=True), create_model("resnet20_1w1a", checkpoint_path=path)):
        assert not model.training
        assert torch.equal(model(x), expected)
    with pytest.raises(UsageError, match="no pretrained weights for vgg_small_1w1a: there are some for resnet20_1w1a"):
        create_model("vgg_small_1w1a", pretrained=True)
    for given in ({"num_classes": 3}, {"freq": 7.0}, {"stage": 1}, {"family": "imagenet"}):
        name = "resnet18_1w1a" if "family" in given else "resnet20_1w1a"
        with pytest.raises(UsageError, match="contradicts"):
            create_model(name, checkpoint_path=path, **given)
    with pytest.raises(UsageError, match="leave weight_quantizer"):
        create_model("resnet20_1w1a", pretrained=True, weight_quantizer=Sign())
    with pytest.raises(UsageError, match="real activations: leave input_quantizer out"):
        create_model("resnet20_1w32a", input_quantizer=Sign())
    with pytest.raises(UsageError, match="real weights: leave weight_quantizer out"):
        create_model("resnet20_32w32a", weight_quantizer=Sign())
    mixed = create_model("resnet20_1w1a")
    mixed.layer1[0].conv1.weight_quantizer = Sign()
    with pytest.raises(UsageError, match="the layers have different quantizers"):
        _ = mixed.metadata
    with pytest.raises(UsageError, match="leave freq and stage out"):
        create_model("resnet20_1w1a", weight_quantizer=Sign(), freq=20.0)


def test_errors_name_the_choices():
    with pytest.raises(ValueError, match=r"'resnet19_1w1a'; choose from .*resnet20, .*_1w1a.* mean resnet18_1w1a\?\)"):
        create_model("resnet19_1w1a")
    with pytest.raises(ValueError, match="unknown family 'mnist'; choose from cifar10, imagenet"):
        list_models("mnist")
    with pytest.raises(ValueError, match="already has"):
        register_model("cifar10", "resnet20")(lambda *_: None)
