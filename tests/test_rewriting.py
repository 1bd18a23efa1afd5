"""The rewritten networks against themselves, layer by layer as published."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_compiler
from torch import fx

from benchmarks.published import published_model, published_regularizer
from biper.cpu.rewriting import fuse, fused_regularizer
from biper.models import create_model, list_models
from biper.nn.activations import ACTIVATIONS, RPReLU
from biper.nn.comparison_quantizers import ErrorDecaySign, RSign
from biper.nn.layers import BinaryConv2d, BinaryLinear, RealConv2d, binary_layers
from biper.nn.losses import periodic_regularizer
from biper.nn.quantizers import InputQuantizer, PolynomialSign, Sign, SquareWave, set_progress
from biper.packed.pack import pack

pytestmark = needs_compiler
SIZES = {"cifar10": 32, "imagenet": 64}
NAMES = [(family, name) for family in SIZES for name in list_models(family) if "32w" not in name]
SMALL = [(f, n) for f, n in NAMES if n in ("resnet20_1w1a", "resnet18A_1w1a", "mobilenet_1w1a")] + [
    ("cifar10", "vgg_small_1w1a"),
    ("imagenet", "resnet18_1w1a"),
]
TRIES = 8
INPUTS = {
    "biper": PolynomialSign(),
    "polynomial": PolynomialSign(standardized=False),
    "sign": Sign(),
    "rsign": RSign(),
    "irnet": ErrorDecaySign(),
}
LEARNED = ("hardtanh", "prelu", "rprelu")


def images(family, count=3, seed=0):
    size = SIZES[family]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def passed(model, forward, x, amp=False):
    """Logits and the convolutions' gradients of a training pass, flat."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        logits = forward(x)
    F.cross_entropy(logits.float(), torch.arange(len(x))).backward()
    return logits, [p.grad.flatten() for p in model.parameters() if p.dim() == 4]


def built(build):
    """A network in training whose parameters leave nothing to chance."""
    torch.manual_seed(0)
    model = build().train()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("alpha"):
                parameter[::3] *= -1
            elif parameter.dim() == 1 and path.endswith("weight"):
                parameter.uniform_(-0.5, 1)  # ImageNet's gains of 1e-8 would hide every layer
            elif parameter.dim() == 1:
                parameter.uniform_(-0.1, 0.1)  # with none, a sum that is the mean itself has no sign but rounding's
    return model


def require_equal_steps(family, plain, other, least_cosine, amp=False):
    """Both ways give the same logits, gradients and statistics.

    Two ways to add up differ in the last place, and where that turns a sign, many others follow: another step is
    compared then. A wrong gradient is wrong in all of them.
    """
    start = {name: buffer.clone() for name, buffer in plain.named_buffers()}
    for seed in range(TRIES):
        x = images(family, seed=seed)
        for model in (plain, other):
            for name, buffer in model.named_buffers():
                buffer.copy_(start[name])
        logits, gradients = passed(plain, plain, x)
        forward = fuse(other) if other is not plain else other
        ours, our_gradients = passed(other, forward, x.to(memory_format=torch.channels_last), amp)
        cosines = [F.cosine_similarity(*pair, dim=0).item() for pair in zip(gradients, our_gradients, strict=True)]
        pairs = [(ours, logits), *((b, other.get_buffer(n)) for n, b in plain.named_buffers())]
        close = [torch.allclose(one, two, atol=2e-3, rtol=2e-3) for one, two in pairs]
        if min(cosines) > least_cosine and all(close):
            return
    pytest.fail(f"steps differ: cosines of the last one {cosines}, close {close}")


@pytest.mark.parametrize(("family", "name"), NAMES)
def test_every_binary_network_can_be_rewritten(family, name):
    torch.manual_seed(0)
    network = create_model(name, family=family, num_classes=10, freq=20.0, stage=2).eval()
    for norm in network.modules():  # as if trained: real activations would grow beyond all numbers
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_var.fill_(100)
    with torch.no_grad():
        x = images(family, 1)
        torch.testing.assert_close(fuse(network)(x), network(x), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("family", "name"), SMALL)
def test_one_step_in_float32(family, name, stage):
    plain = built(lambda: published_model(name, family, 10, stage))
    require_equal_steps(
        family, plain, built(lambda: create_model(name, family=family, num_classes=10, freq=20.0, stage=stage)), 0.999
    )


@pytest.mark.parametrize(("family", "name"), SMALL)
def test_one_step_of_stage_2_in_bfloat16(family, name):
    """-1 and +1 are exact in bfloat16, and so are their sums: the forward pass is float32's, the gradients near it."""
    plain = built(lambda: published_model(name, family, 10, 2))
    require_equal_steps(
        family,
        plain,
        built(lambda: create_model(name, family=family, num_classes=10, freq=20.0, stage=2)),
        0.99,
        amp=True,
    )


def test_without_the_kernels_the_forward_pass_in_bfloat16_is_float32s_too():
    plain = built(lambda: create_model("resnet20_1w1a", stage=2))
    x = images("cifar10")
    logits, gradients = passed(plain, plain, x)
    ours, our_gradients = passed(plain, plain, x, amp=True)
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-4)
    assert min(F.cosine_similarity(*pair, dim=0) for pair in zip(gradients, our_gradients, strict=True)) > 0.99


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # as torch 2.11 says of every profile
def test_nothing_of_a_fused_binary_network_stays_a_pass_of_its_own():
    network = create_model("resnet20_1w1a")
    with torch.profiler.profile() as profile:
        fuse(network.train())(images("cifar10")).sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["_Unit"] == 19
    assert not {"aten::hardtanh", "_StandardizedSign"} & calls.keys()
    assert calls["aten::native_batch_norm"] == 1  # the classifier's


@pytest.mark.parametrize("name", ["resnet20_1w1a", "resnet20_32w32a"])
def test_regularizers_agree(name):
    torch.manual_seed(0)
    network = create_model(name)
    weights = [layer.weight for _, layer in binary_layers(network)]
    values, gradients = [], []
    for regularizer in (published_regularizer, periodic_regularizer, fused_regularizer):
        value = regularizer(network, 0.04)
        values.append(value)
        gradients.append(torch.autograd.grad(value, weights) if weights else ())
    for value, gradient in zip(values[1:], gradients[1:], strict=True):
        torch.testing.assert_close(value, values[0])
        torch.testing.assert_close(gradient, gradients[0])


class Odd(torch.nn.Module):
    """A network of somebody's own, around two layers that the kernels know."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.conv1, self.conv2 = (
            BinaryConv2d(16, 16, 3, padding=1, weight_quantizer=SquareWave(20.0)) for _ in range(2)
        )
        options = {
            "affine": {"affine": False},
            "momentum": {"momentum": None},
            "memory": {"track_running_stats": False},
        }
        self.bn1, self.bn2 = (torch.nn.BatchNorm2d(16, **options.get(kind, {})) for _ in range(2))
        self.relu = torch.nn.ReLU(inplace=True)
        self.bias = torch.nn.Parameter(torch.ones(16, 1, 1))
        self.calls = 0
        if kind == "hook":
            self.conv1.register_forward_hook(self.count)
        if kind == "subclass":
            self.conv1.__class__ = Tanh

    def count(self, *_):
        self.calls += 1

    def forward(self, x):
        x = self.stem(x)
        if self.kind == "size" and x.shape[2] != 6:
            raise ValueError("of another size")
        kinds = {
            "alpha": lambda: torch.add(self.bn1(self.conv1(x)), x, alpha=2),
            "bounds": lambda: F.hardtanh(self.bn1(self.conv1(x)), -2, 2),
            "broadcast": lambda: self.bn1(self.conv1(x)) + F.adaptive_avg_pool2d(x, 1),
            "inplace": lambda: self.relu(self.bn1(self.conv1(x)) + x),
            "iadd": lambda: self.in_place(self.bn1(self.conv1(x)), x),
            "attribute": lambda: self.bn1(self.conv1(x)) + self.bias,
            "named": lambda: F.hardtanh(input=self.bn1(input=self.conv1(input=x))) + x,
            "dropout": lambda: F.dropout(self.bn1(self.conv1(x)), 0.5, self.training),
        }
        out = kinds.get(self.kind, lambda: self.bn1(self.conv1(x)) + x)()
        return F.hardtanh(self.bn2(self.conv2(out)) + out).mean((2, 3))

    def in_place(self, out, x):
        out += x
        return out


class Tanh(BinaryConv2d):
    def effective_weight(self):
        return torch.tanh(self.weight)


KINDS = "affine named momentum memory alpha bounds broadcast inplace iadd attribute size hook subclass frozen plain"


@pytest.mark.filterwarnings("ignore:all activations are")  # of its ReLU
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("kind", KINDS.split())
def test_a_network_of_somebodys_own_computes_the_same(kind, amp):
    results = []
    for rewritten in (True, False):
        torch.manual_seed(0)
        network = Odd(kind).train()
        if kind == "frozen":
            network.bn1.eval()
        x = torch.randn(4, 3, 6, 6).to(memory_format=torch.channels_last)
        logits, gradients = passed(network, fuse(network) if rewritten else network, x, amp)
        results.append((logits, torch.cat(gradients), network.calls))
    (ours, our_gradients, our_calls), (theirs, gradients, calls) = results
    torch.testing.assert_close(ours.float(), theirs.float(), atol=1e-3, rtol=1e-3)
    assert F.cosine_similarity(our_gradients, gradients, dim=0) > 0.999
    assert our_calls == calls


@fx.wrap
def doubled(*, x):
    return 2 * x


@fx.wrap
def chosen(*args, **given):
    return given["args"] - sum(args)


class Calling(torch.nn.Module):
    """Calls functions and a layer in ways in which the name says which argument it is."""

    def __init__(self):
        super().__init__()
        self.conv = BinaryConv2d(3, 16, 3, padding=1, weight_quantizer=SquareWave(20.0))
        self.norm = torch.nn.BatchNorm2d(16)
        self.norm.register_forward_pre_hook(lambda _, args, given: (args, {"input": given["input"]}), with_kwargs=True)

    def forward(self, x):
        return chosen(args=doubled(x=self.norm(input=self.conv(x)))).mean((2, 3))


def test_arguments_whose_names_matter_keep_them():
    network, x = Calling(), torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(fuse(network.train())(x), network(x), rtol=1e-3, atol=1e-3)
    with pytest.warns(UserWarning, match="these norms have hooks"):
        packed = pack(network.eval())
    torch.testing.assert_close(packed(x), network(x), rtol=1e-5, atol=1e-5)


def test_training_and_evaluation_are_traced_apart():
    torch.manual_seed(0)
    network = Odd("dropout").eval()
    forward, x = fuse(network), torch.ones(2, 3, 6, 6)
    with torch.no_grad():
        assert torch.allclose(forward(x), network(x), atol=1e-5)
        network.train()
        assert not torch.equal(forward(x), forward(x))


def test_one_value_a_channel_has_no_variance():
    network = torch.nn.Sequential(BinaryConv2d(16, 16, 1), torch.nn.BatchNorm2d(16)).train()
    with pytest.raises(ValueError, match="more than one value per channel"):
        fuse(network)(-torch.ones(1, 16, 1, 1))


def test_the_fused_regularizer_takes_linear_layers_too():
    model = torch.nn.Sequential(BinaryLinear(16, 16, weight_quantizer=SquareWave(20.0)), BinaryConv2d(16, 16, 1))
    ours, theirs = fused_regularizer(model, 0.5), periodic_regularizer(model, 0.5)
    torch.testing.assert_close(ours, theirs)
    for gradient, other in zip(
        *(torch.autograd.grad(x, [m.weight for m in model]) for x in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(gradient, other)


class Residual(torch.nn.Module):
    """Every way in which a unit's activations are used: by a skip, by none, by layers with quantizers of their own."""

    def __init__(self, activation, *inputs):
        super().__init__()
        self.stem = RealConv2d(3, 16, 3, padding=1, bias=False)
        self.convs = torch.nn.ModuleList(
            BinaryConv2d(
                16, 16, 3, padding=1, weight_quantizer=SquareWave(20.0), input_quantizer=inputs[i % len(inputs)]
            )
            for i in range(5)
        )
        self.bns = torch.nn.ModuleList(torch.nn.BatchNorm2d(16) for _ in range(6))
        self.activations = torch.nn.ModuleList(ACTIVATIONS[activation](16) for _ in range(5))

    def forward(self, x):
        first, *convs = self.convs
        norm, *norms = self.bns
        x = self.activations[0](norm(self.stem(x)))
        x = self.activations[1](norms[0](first(x)) + x)
        y = self.activations[2](norms[1](F.max_pool2d(convs[0](x), 3, 1, 1)))
        x = self.activations[3](norms[2](convs[1](y)) + norms[3](convs[2](x)))
        return self.activations[4](norms[4](convs[3](x)) + x).mean((2, 3))


def scattered(network):
    """The network, of whose learned numbers and running statistics none is left to its beginning."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() < 4:
                centre = 0.7 if "bn" in name and name.endswith("weight") else 0
                parameter.copy_(centre + 0.3 * torch.randn(parameter.shape))
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(50, 200)
    set_progress(network, 0.4)
    return network


def residual(activation, inputs):
    torch.manual_seed(0)
    return scattered(Residual(activation, *inputs))


def resnet20(activation, inputs):
    torch.manual_seed(0)
    how = {"weight_quantizer": SquareWave(20.0), "input_quantizer": inputs[0], "activation": activation}
    return scattered(create_model("resnet20_1w1a", **how))


def step(network, forward, images, amp):
    """Logits and the gradients of images and parameters, by name."""
    images = images.to(memory_format=torch.channels_last).requires_grad_()
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        logits = forward(images)
    F.cross_entropy(logits, torch.arange(len(images))).backward()
    leaves = {"images": images, **dict(network.named_parameters())}
    return logits.double(), {name: leaf.grad.double().flatten() for name, leaf in leaves.items()}


def require_equal_gradients(network, amp):
    """The fused network's logits and gradients are near the plain one's in float64. See require_equal_steps."""
    start = copy.deepcopy(network.state_dict())
    exact = copy.deepcopy(network).double()
    for seed in range(TRIES):
        network.load_state_dict(start)
        x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
        expected, gradients = step(exact, exact, x.double(), False)
        logits, ours = step(network, fuse(network), x, amp)
        cosines = {  # a norm takes a shift before it out again
            name: F.cosine_similarity(ours[name], gradient, dim=0).item()
            for name, gradient in gradients.items()
            if gradient.norm() > 1e-6
        }
        near = (logits - expected).abs().max() < 1e-3
        if near and min(cosines.values()) > (0.99 if amp else 0.9999):
            return
    pytest.fail(f"steps differ: logits {logits - expected}, cosines {cosines}")


BUILDS = [residual, resnet20]


@pytest.mark.parametrize("activation", LEARNED)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("build", BUILDS)
def test_in_evaluation_every_kind_equals_torchs_to_the_last_bit(build, inputs, activation):
    network = build(activation, [INPUTS[inputs]]).eval()
    x = images("cifar10", 2).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(fuse(network)(x), network(x))


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("activation", LEARNED)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("build", BUILDS)
def test_in_training_every_kind_is_near_torchs(build, inputs, activation, amp):
    require_equal_gradients(build(activation, [INPUTS[inputs]]).train(), amp)


@pytest.mark.parametrize("activation", LEARNED)
def test_layers_of_different_quantizers_read_the_same_activations(activation):
    require_equal_gradients(residual(activation, [RSign(), PolynomialSign(), Sign(), ErrorDecaySign()]).train(), False)


@pytest.mark.parametrize("inputs", INPUTS)
def test_with_frozen_statistics_every_kind_is_near_torchs(inputs):
    require_equal_gradients(residual("rprelu", [INPUTS[inputs]]).eval(), False)


class Doubled(RPReLU):
    def forward(self, x):
        return 2 * super().forward(x)


class OneSided(InputQuantizer):
    def forward(self, a):
        return 2 * (a >= 0.5).to(a.dtype) - 1 + a.clamp(-1, 1) - a.clamp(-1, 1).detach()


def test_what_the_kernels_do_not_know_torch_computes():
    network = residual("rprelu", [OneSided(), RSign()]).train()
    network.activations[0] = Doubled(16)
    network.activations[2] = torch.nn.PReLU()  # one slope for all channels
    calls = []
    network.activations[1].register_forward_hook(lambda *_: calls.append("activation"))
    network.convs[1].input_quantizer.register_forward_hook(lambda *_: calls.append("signs"))
    require_equal_gradients(network, False)
    calls.clear()
    fuse(network)(images("cifar10"))
    assert sorted(calls) == ["activation", "signs"]


@pytest.mark.parametrize("inputs", INPUTS)
def test_the_number_of_threads_changes_nothing(inputs):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        network = residual("rprelu", [INPUTS[inputs]]).train()
        x = torch.randn(5, 16, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        unit = torch.nn.Sequential(network.bns[0], network.activations[0], network.convs[0], network.bns[1])
        logits = fuse(unit.train())(x)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), [x, *unit[:2].parameters()])])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # as torch 2.11 says of every profile
def test_nothing_of_reactnet_stays_a_pass_of_its_own():
    network = create_model("resnet20_react_1w1a")
    with torch.profiler.profile() as profile:
        fuse(network.train())(images("cifar10")).sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["_Unit"] == 19
    assert not {"aten::prelu", "aten::_prelu_kernel", "_ThresholdSign", "_Signs"} & calls.keys()
