"""Any torch model: converted, trained for some steps, made binary, packed, saved, loaded; equal in all."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import biper
from biper.errors import UsageError
from biper.nn.layers import BinaryConv2d, BinaryLinear, binary_layers
from biper.packed.layers import FoldedNorm, PackedConv2d, PackedLinear


class Small(nn.Module):
    """Hidden linear layers, bias, dilation, depth-wise convolutions, and sums in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.deep = nn.Conv2d(20, 20, 3, padding=2, dilation=2, groups=20)
        self.wide = nn.Conv2d(20, 24, (3, 2), stride=2, padding=(1, 0), bias=True)
        self.norms = nn.ModuleList([nn.BatchNorm2d(20), nn.BatchNorm2d(20), nn.BatchNorm2d(24)])
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.1)
        self.hidden, self.norm, self.head = nn.Linear(24, 40), nn.BatchNorm1d(40), nn.Linear(40, 10)

    def forward(self, x):
        x = self.act(self.norms[0](self.stem(x)))
        y = self.norms[1](self.deep(x))
        y += x
        x = self.act(y)
        x = self.act(self.norms[2](self.wide(x)))
        x = self.drop(x.mean((2, 3)) - 0.1)
        return self.head(F.hardtanh(self.norm(self.hidden(x))))


def vgg():
    """torchvision's with a narrow classifier: the other's 100 million weights prove no more."""
    model = torchvision.models.vgg11_bn(num_classes=10)
    model.classifier[0], model.classifier[3], model.classifier[6] = (
        nn.Linear(512 * 49, 64),
        nn.Linear(64, 64),
        nn.Linear(64, 10),
    )
    return model


MODELS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 32),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), 32),
    "vgg11_bn": (vgg, 32),
    "small": (Small, 16),
}


def train(model, size, steps, batch=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(batch, 3, size, size, generator=generator), torch.randint(10, (batch,), generator=generator)
        loss = F.cross_entropy(model.train()(x), y) + biper.periodic_regularizer(model, 0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_from_a_model_to_a_packed_file(name, tmp_path):
    torch.manual_seed(0)
    build, size = MODELS[name]
    model = biper.convert(build(), weight_quantizer=biper.Sine(20.0), verbose=False)
    before = [p.clone() for p in model.parameters()]
    train(model, size, 4)
    biper.binarize_(model)
    train(model, size, 4)
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    x = torch.randn(5, 3, size, size)
    with torch.no_grad():
        expected, packed = model.eval()(x), biper.pack(model)
        torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-4)
        biper.save_packed(packed, tmp_path / "net.safetensors")
        skeleton = biper.convert(build(), weight_quantizer=biper.Sine(1.0), verbose=False)
        loaded = biper.load_packed(tmp_path / "net.safetensors", model=skeleton)
        assert torch.equal(loaded(x), packed(x))
    kinds = [type(m) for m in packed.modules()]
    assert sum(kind in (PackedConv2d, PackedLinear) for kind in kinds) == len(list(binary_layers(model)))
    assert FoldedNorm in kinds


def test_what_stays_real_and_why(capsys):
    model = biper.convert(torchvision.models.resnet18(), weight_quantizer=biper.Sign())
    told = capsys.readouterr().out
    assert "conv1: stays, the first convolution" in told
    assert "layer2.0.downsample.0: stays, a 1x1 convolution that adapts a skip" in told
    assert "fc: stays, the last linear layer" in told
    assert "layer1.0.conv1: Conv2d -> BinaryConv2d" in told
    assert "layer1.0.relu: ReLU -> Hardtanh (a sign follows)" in told
    assert told == "\n".join(map(str, model.conversion)) + "\n"
    assert len(list(binary_layers(model))) == 16
    pointwise = biper.convert(torchvision.models.mobilenet_v2(), weight_quantizer=biper.Sign(), verbose=False)
    assert len(list(binary_layers(pointwise))) == 51  # all but the stem; the head is linear


def test_weights_are_taken_over_and_alpha_starts_closest_to_them():
    torch.manual_seed(0)
    real = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Hardtanh(), nn.Conv2d(8, 6, 3, bias=True), nn.Flatten(), nn.Linear(6, 2)
    )
    latent, bias = real[2].weight, real[2].bias
    model = biper.convert(real, weight_quantizer=biper.Sign(), verbose=False)
    assert model is real
    assert model[2].weight is latent
    assert model[2].bias is bias
    torch.testing.assert_close(model[2].alpha.flatten(), latent.abs().mean((1, 2, 3)))


def test_skip_takes_names_patterns_and_functions():
    def converted(skip):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8, 8))
        model = biper.convert(model, weight_quantizer=biper.Sign(), skip=skip, verbose=False)
        return [name for name, _ in binary_layers(model)]

    assert converted(None) == ["1"]
    assert converted(()) == ["0", "1", "3"]
    assert converted(["1"]) == ["0", "3"]
    assert converted("[01]") == ["3"]
    assert converted(lambda name, layer: isinstance(layer, nn.Linear)) == ["0", "1"]
    with pytest.raises(UsageError, match=r"skip: no convolution or linear layer is called 'fc'; they are 0, 1, 3"):
        converted(["fc"])
    with pytest.raises(UsageError, match="nothing to convert"):
        converted("*")


def test_layers_that_cannot_be_binary_stay_and_say_why():
    class Own(nn.Conv2d):
        pass

    reflecting = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Own(8, 8, 3), reflecting, nn.Conv2d(8, 8, 3))
    biper.convert(model, weight_quantizer=biper.Sine(20.0), verbose=False)
    reasons = {decision.name: decision.reason for decision in model.conversion}
    assert "way of its own" in reasons["1"]
    assert "padding mode is 'reflect'" in reasons["2"]
    assert isinstance(model[3], BinaryConv2d)
    with pytest.raises(UsageError, match=r"no nn\.Conv2d and no nn\.Linear"):
        biper.convert(nn.ReLU(), weight_quantizer=biper.Sine(20.0))


def test_a_layer_alone_and_a_layer_in_two_places():
    layer = biper.convert(nn.Linear(8, 4), weight_quantizer=biper.Sine(20.0), skip=(), verbose=False)
    assert isinstance(layer, BinaryLinear)
    shared = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), shared, nn.Hardtanh(), shared)
    biper.convert(model, weight_quantizer=biper.Sine(20.0), verbose=False)
    assert model[1] is model[3]
    assert isinstance(model[1], BinaryConv2d)


def test_a_relu_stays_where_no_sign_follows_and_where_something_negative_is_added():
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)
            self.one, self.two = nn.ReLU(), nn.ReLU()

        def forward(self, x):
            x = self.stem(x)
            return self.head(self.two(self.conv(x + self.one(x))).mean((2, 3)))

    model = biper.convert(Added(), weight_quantizer=biper.Sine(20.0), verbose=False)
    assert type(model.one) is type(model.two) is nn.ReLU
    model.train()(torch.randn(4, 3, 5, 5))  # no warning


class Functional(nn.Module):
    """Its ReLU is a function, which no conversion can reach."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)

    def forward(self, x):
        return self.conv(F.max_pool2d(F.relu(self.stem(x)), 2)).mean((2, 3))


def test_a_relu_that_cannot_be_replaced_is_warned_of_in_convert_in_training_and_in_pack():
    with pytest.warns(UserWarning, match="conv sees no negative input, .* in the place of the function relu"):
        model = biper.convert(Functional(), weight_quantizer=biper.SquareWave(20.0), verbose=False)
    with pytest.warns(UserWarning, match="sees no negative input"):
        model.train()(torch.randn(2, 3, 12, 12))
    with pytest.warns(UserWarning, match="all activations are .1: conv sees no negative input"):
        biper.pack(model)


def test_a_network_that_cannot_be_traced_is_converted_too():
    class Branching(Functional):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return (
                self.conv(self.act(self.stem(x))).mean((2, 3)) if x.sum() > 0 else self.conv(self.stem(x)).mean((2, 3))
            )

    model = biper.convert(Branching(), weight_quantizer=biper.Sine(20.0), verbose=False)
    assert isinstance(model.act, nn.Hardtanh)


def test_what_pack_refuses_and_names():
    real = nn.Sequential(BinaryConv2d(3, 4, 3, weight_quantizer=biper.Sine(20.0)))
    with pytest.raises(
        UsageError, match=r"the weights of 0 are real, as in stage 1: train stage 2, or biper\.binarize_"
    ):
        biper.pack(real)

    class Own(BinaryConv2d):
        def effective_weight(self):
            return self.weight.sign()

    own = Own(4, 4, 3)
    with pytest.raises(
        UsageError, match=r"nothing to pack: all binary layers compute in a way of their own: 0 \(Own\)"
    ):
        biper.pack(nn.Sequential(own))
    with pytest.warns(UserWarning, match=r"stay real: 1 \(Own\)"):
        packed = biper.pack(nn.Sequential(BinaryConv2d(4, 4, 3, weight_quantizer=biper.Sign()), own))
    assert isinstance(packed.network[0], PackedConv2d)


def test_a_file_of_ones_own_needs_a_model_that_fits(tmp_path):
    def network(channels):
        return nn.Sequential(BinaryConv2d(4, channels, 3, weight_quantizer=biper.Sign()), nn.BatchNorm2d(channels))

    file = tmp_path / "net.safetensors"
    biper.save_packed(biper.pack(network(8)), file)
    with pytest.raises(
        UsageError, match=r"somebody's own \(Sequential\), which its code makes: in Python load_packed\(path, model="
    ):
        biper.load_packed(file)
    with pytest.raises(UsageError, match=r"does not fit Sequential: 0\.alpha is"):
        biper.load_packed(file, model=network(9))
    with pytest.raises(UsageError, match="model has no binary layers"):
        biper.load_packed(file, model=nn.Linear(2, 2))
    with pytest.raises(UsageError, match=r"give image_size or example"):
        biper.export_onnx(biper.load_packed(file, model=network(8)), tmp_path / "net.onnx")


def test_a_file_of_ones_own_says_what_its_layers_compute(tmp_path):
    def network(**options):
        return nn.Sequential(BinaryConv2d(4, 8, 3, weight_quantizer=biper.Sign(), **options))

    file = tmp_path / "net.safetensors"
    biper.save_packed(biper.pack(network(stride=2)), file)
    for options in ({"stride": 1}, {"stride": 2, "padding": 1}, {"stride": 2, "input_quantizer": None}):
        with pytest.raises(UsageError, match="does not fit the model: its 0 is"):
            biper.load_packed(file, model=network(**options))


def test_a_layer_in_two_places_is_saved_and_loaded(tmp_path):
    def network():
        shared = BinaryConv2d(8, 8, 3, padding=1, weight_quantizer=biper.Sign())
        return nn.Sequential(shared, nn.Hardtanh(), shared).eval()

    x, packed = torch.randn(2, 8, 5, 5), biper.pack(network())
    biper.save_packed(packed, tmp_path / "net.safetensors")
    with torch.no_grad():
        assert torch.equal(biper.load_packed(tmp_path / "net.safetensors", model=network())(x), packed(x))


def test_attention_hooks_and_computed_weights_stay_real_and_a_normalization_is_no_pooling():
    model = nn.Sequential(
        nn.TransformerEncoderLayer(16, 2, 16, batch_first=True),
        nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
        nn.Linear(16, 16),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.InstanceNorm1d(4),
        nn.Linear(16, 16),
    )
    model[2].register_forward_hook(lambda *_: None)
    biper.convert(model, weight_quantizer=biper.Sign(), skip=(), verbose=False)
    assert [name for name, _ in binary_layers(model)] == ["3", "6"]
    assert isinstance(model[4], nn.ReLU)  # what follows makes its values negative again
    x = torch.randn(2, 4, 16)
    with torch.no_grad():
        torch.testing.assert_close(biper.pack(model.eval())(x), model(x))


def test_other_types_than_float32_and_converted_registered_networks():
    with pytest.raises(UsageError, match=r"packed in float32, this one is torch\.float64"):
        biper.pack(nn.Sequential(BinaryConv2d(4, 8, 3, weight_quantizer=biper.Sign())).double())
    twin = biper.convert(biper.create_model("resnet20_32w32a"), weight_quantizer=biper.Sign(), verbose=False)
    assert biper.pack(twin).metadata is None  # it is no longer what its metadata say


def test_quantizers_that_give_no_signs_are_not_packed():
    class Half(biper.WeightQuantizer):
        def forward(self, w):
            return 0.5 * w.sign()

    class Shifted(biper.InputQuantizer):
        def forward(self, a):
            return torch.where(a >= 0.5, 1.0, -1.0)

    with pytest.raises(UsageError, match=r"Half gives other weights than -1 and \+1"):
        biper.pack(nn.Sequential(BinaryConv2d(4, 4, 3, weight_quantizer=Half())))
    layers = [BinaryConv2d(4, 4, 3, weight_quantizer=biper.Sign(), input_quantizer=Shifted()) for _ in range(2)]
    with pytest.raises(UsageError, match="compute in a way of their own"):
        biper.pack(nn.Sequential(*layers))
    with pytest.warns(UserWarning, match=r"stay real: 0 \(BinaryConv2d\)"):
        packed = biper.pack(nn.Sequential(layers[0], BinaryLinear(3, 4, weight_quantizer=biper.Sign())).eval())
    assert isinstance(packed.network[1], PackedLinear)


def test_the_first_layer_of_a_network_without_convolutions_stays_real():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    biper.convert(model, weight_quantizer=biper.Sign(), verbose=False)
    assert [name for name, _ in binary_layers(model)] == ["2"]


class Borrowing(nn.Module):
    """Reads its layer's weights by itself, as an attention's functions do."""

    def __init__(self):
        super().__init__()
        self.first, self.borrowed, self.called, self.last = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        x = F.linear(self.first(x), self.borrowed.weight, self.borrowed.bias)
        self.seen = x.to(self.called.weight.dtype)  # of which the type alone is read
        return self.last(self.called(self.seen))


def test_a_layer_whose_weights_are_read_from_outside_stays_real(capsys):
    model = biper.convert(Borrowing(), weight_quantizer=biper.Sign())
    assert not hasattr(model, "seen")  # as it was looked at, not run
    assert [name for name, _ in binary_layers(model)] == ["called"]
    assert "borrowed: stays, the module around it reads its weights" in capsys.readouterr().out


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_pre_hook"])
def test_layers_norms_and_activations_with_hooks_stay(register):
    model = nn.Sequential(
        nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 4)
    )
    watched = model[1], model[3], model[4]
    for module in watched:
        getattr(module, register)(lambda *_: None)
    with pytest.warns(UserWarning, match="put a hardtanh in the place of 1"):
        biper.convert(model, weight_quantizer=biper.Sign(), verbose=False)
    assert all(any(module is kept for kept in model) for module in watched)
    with (
        pytest.warns(UserWarning, match="these norms have hooks and are not folded: 3"),
        pytest.warns(UserWarning, match="all activations are"),
    ):
        packed = biper.pack(model.eval()).network
    assert type(packed[3]) is nn.BatchNorm1d


def test_half_precision_has_room_for_the_sums_of_squares():
    model = nn.Sequential(nn.Linear(4, 70000), nn.Linear(70000, 4), nn.Linear(4, 4)).half()
    biper.convert(model, weight_quantizer=biper.SquareWave(20.0), verbose=False)
    assert model[1].alpha.isfinite().all()
    assert model[1].alpha.all()


@pytest.mark.parametrize("name", ["weight", "alpha"])
def test_a_network_that_has_diverged_is_not_packed(name, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    packed = biper.pack(biper.convert(model, weight_quantizer=biper.Sign(), verbose=False))
    getattr(model[1], name).data[0] = float("nan")
    with pytest.raises(UsageError, match=rf"the model holds no trained network: 1\.{name} is not finite"):
        biper.pack(model)
    packed.network[1].alpha[0] = float("inf")
    with pytest.raises(UsageError, match=r"the network holds no trained network: 1\.alpha is not finite"):
        biper.save_packed(packed, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


class Masked(nn.Linear):
    """Somebody's own layer, whose buffer rightly holds infinity."""

    def __init__(self):
        super().__init__(8, 8)
        self.register_buffer("mask", torch.full((8,), float("-inf")))

    def forward(self, x):
        return super().forward(x).maximum(self.mask)


def test_infinity_in_a_buffer_of_ones_own_is_no_divergence(tmp_path):
    model = nn.Sequential(Masked(), biper.BinaryLinear(8, 4, weight_quantizer=biper.Sign())).eval()
    biper.save_packed(biper.pack(model), tmp_path / "net.safetensors")
    loaded, x = biper.load_packed(tmp_path / "net.safetensors", model=model), torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))
    model[0].mask[0] = float("nan")
    with pytest.raises(UsageError, match=r"0\.mask is not finite"):
        biper.pack(model)
