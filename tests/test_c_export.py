"""Packed networks as C: the layers, the plan, whole networks on this machine and on emulated ones, and bad input."""

import ctypes
import random
import shutil
import struct
import subprocess
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, needs_compiler
from torch import nn

import biper
from benchmarks.targets import M4, TARGETS
from biper.commands.export import main as export_main
from biper.data.loaders import build_loaders
from biper.errors import UsageError
from biper.models import create_model
from biper.models.imagenet_resnet import DownsampledDoubleSkip, PooledDownsampledDoubleSkip
from biper.models.mobilenet import MobileBlock, ReActBlock
from biper.models.registry import Precision
from biper.nn.activations import RPReLU
from biper.nn.layers import BinaryConv2d
from biper.packed.c.export import FILES, export_c
from biper.packed.c.native import NativeNetwork
from biper.packed.c.plan import plan
from biper.packed.c.source import integer_thresholds
from biper.packed.file import load_packed
from biper.packed.pack import pack
from biper.training.export_c import _calibration
from biper.training.settings import make_settings

SHIPPED = ROOT / "pretrained_models/resnet20_1w1a/packed.safetensors"
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-ffp-contract=off", "-fno-strict-aliasing")
IMAGES = 4


def settled(network, size):
    """A network with batch norms as training leaves them: some gains negative, statistics of images."""
    for module in network.eval().modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.weight.data.uniform_(0.5, 1.5).mul_(torch.where(torch.rand(module.num_features) < 0.1, -1.0, 1.0))
            module.bias.data.normal_(0, 0.3)
            module.train()
    with torch.no_grad():
        network(torch.randn(8, 3, size, size))
    return network.eval()


def random_network(name):
    """One of ours, packed."""
    torch.manual_seed(0)
    return pack(biper.binarize_(settled(create_model(name), 32)))


def pixels_of(count, seed=0):
    """Random images of 32x32 as bytes."""
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def normalized(packed, pixels):
    """As the loaders normalize: (N, 3, 32, 32)."""
    mean, std = torch.tensor(packed.metadata.mean) * 255, torch.tensor(packed.metadata.std) * 255
    return ((pixels.float() - mean) / std).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def shipped():
    return load_packed(SHIPPED)


@pytest.fixture(scope="module")
def folder(shipped, tmp_path_factory):
    """The shipped network as C, with images to compile in."""
    target = tmp_path_factory.mktemp("c") / "resnet20"
    export_c(shipped, target)
    rows = ",\n".join("{" + ", ".join(map(str, image.flatten().tolist())) + "}" for image in pixels_of(IMAGES))
    (target / "images.h").write_text(f"static const uint8_t images[][RESNET20_1W1A_PIXELS] = {{\n{rows}}};\n")
    return target


def answers(text):
    """Classes and logits that the program printed."""
    rows = [line.split() for line in text.splitlines()]
    logits = [[struct.unpack(">f", bytes.fromhex(word))[0] for word in row[1:]] for row in rows]
    return [int(row[0]) for row in rows], torch.tensor(logits)


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory):
    """What the plainest build on this machine prints."""
    return build_and_run("gcc", folder, tmp_path_factory.mktemp("reference"))


def build_and_run(name, folder, place):
    """What main.c prints for the images, compiled for a target and run there."""
    target = TARGETS[name]
    for tool in (target.compile[0], *target.run[:1]):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    sources = [str(folder / file) for file in ("main.c", "network.c", "kernels.c")]
    given = [] if target.reads else ['-DIMAGES="images.h"', f"-I{folder}"]
    program = str(place / "network")
    done = subprocess.run([*target.compile, *STRICT, *given, *sources, "-o", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = pixels_of(IMAGES).numpy().tobytes() if target.reads else None
    done = subprocess.run([*target.run, program], input=data, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return (done.stdout + (b"" if target.reads else done.stderr)).decode()  # semihosting may print where qemu logs


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_gives_the_same_bits(target, folder, shipped, reference, tmp_path):
    printed = build_and_run(target, folder, tmp_path)
    assert printed == reference
    classes, logits = answers(printed)
    expected = shipped(normalized(shipped, pixels_of(IMAGES)))
    assert classes == expected.argmax(1).tolist()
    assert len(classes) == IMAGES
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_it_is_small_enough_for_a_microcontroller(folder, shipped, tmp_path):
    if shutil.which("arm-none-eabi-gcc") is None:
        pytest.skip("arm-none-eabi-gcc is not installed")
    flash = 0
    for name in ("network", "kernels"):
        compiled = str(tmp_path / f"{name}.o")
        command = ["arm-none-eabi-gcc", "-Os", *M4, *STRICT, "-c", str(folder / f"{name}.c"), "-o", compiled]
        subprocess.run(command, check=True)
        text, data, bss = map(int, subprocess.check_output(["arm-none-eabi-size", compiled]).split()[6:9])
        assert (data, bss) == (0, 0)  # nothing is written to
        flash += text
    assert flash < 70_000
    assert plan(shipped, 32).arena <= 160_000
    assert plan(shipped, 32, "int8").arena <= 48_000


@needs_compiler
@pytest.mark.parametrize(
    "name", ["resnet20_1w1a", "resnet20_react_1w1a", "resnet18A_1w1a", "vgg_small_1w1a", "resnet20_1w32a"]
)
def test_networks_of_cifar_equal_the_packed_ones(name, tmp_path):
    packed = random_network(name)
    native = NativeNetwork(packed, export_c(packed, tmp_path / "c"), tmp_path / "c")
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(native(images), packed(images), rtol=1e-3, atol=1e-3)


def require_equal_c(packed, size, folder):
    """The logits of a network's C, compiled for this machine, are those of the packed network."""
    native = NativeNetwork(packed, export_c(packed, folder, image_size=size), folder)
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(native(images), packed(images), rtol=1e-3, atol=1e-3)


class Blocks(nn.Module):
    """A block of each kind that ImageNet's networks are made of: groups, copies, real convolutions in the skips."""

    def __init__(self):
        super().__init__()
        precision = Precision(partial(BinaryConv2d, weight_quantizer=biper.SquareWave(20.0)), RPReLU)
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.PReLU(32))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(
            MobileBlock(32, 64, 2, precision),
            ReActBlock(64, 128, 1, precision),
            DownsampledDoubleSkip(128, 80, 2, precision),
            PooledDownsampledDoubleSkip(80, 96, 2, precision),
        )
        self.mean, self.last = nn.AdaptiveAvgPool2d(1), nn.Linear(96, 7)

    def forward(self, x):
        return self.last(torch.flatten(self.mean(self.blocks(self.pool(self.stem(x)))), 1))


@needs_compiler
def test_blocks_of_imagenet_equal_the_packed_ones(tmp_path):
    torch.manual_seed(0)
    require_equal_c(pack(settled(Blocks(), 60)), 60, tmp_path / "c")


class Oblong(nn.Module):
    """Maps whose heights are not their widths."""

    def __init__(self):
        super().__init__()
        options = {"padding": 1, "weight_quantizer": biper.SquareWave(20.0)}
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, (2, 1), 1, bias=False), nn.BatchNorm2d(16), nn.Hardtanh())
        self.hidden = nn.Sequential(BinaryConv2d(16, 32, 3, (1, 2), **options), nn.BatchNorm2d(32), nn.Hardtanh())
        self.end = nn.Sequential(BinaryConv2d(32, 32, 3, (2, 1), **options), nn.BatchNorm2d(32), nn.Hardtanh())
        self.mean, self.last = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 7)

    def forward(self, x):
        return self.last(torch.flatten(self.mean(self.end(self.hidden(self.stem(x)))), 1))


@needs_compiler
def test_oblong_maps_equal_the_packed_ones(tmp_path):
    torch.manual_seed(0)
    require_equal_c(pack(settled(Oblong(), 24)), 24, tmp_path / "c")


POINTERS = "alpha bias gain shift before slope after threshold integers turned"
NUMBERS = (
    "height width channels out_height out_width out_channels kernel_h kernel_w stride_h stride_w pad_h pad_w "
    "dilation_h dilation_w groups pool"
)


class Tail(ctypes.Structure):
    """A biper_tail."""

    _fields_ = [*((name, ctypes.c_void_p) for name in POINTERS.split()), ("activation", ctypes.c_int32)]


class Layer(ctypes.Structure):
    """A biper_layer."""

    _fields_ = [*((name, ctypes.c_int32) for name in NUMBERS.split()), ("tail", Tail)]


class Map(ctypes.Structure):
    """A biper_map of floats."""

    _fields_ = [("data", ctypes.c_void_p), ("step", ctypes.c_float), ("type", ctypes.c_int32)]


@pytest.fixture(scope="module", params=["-march=native", "-mno-avx"])
def kernels(request, tmp_path_factory):
    """The kernels as a library: with what this processor has, and plain."""
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    flags = [*STRICT, "-O2", request.param, "-fPIC", "-shared"]
    subprocess.run(["gcc", *flags, str(FILES / "kernels.c"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def random_geometry(choose):
    """A convolution's numbers, with images that it fits into."""
    groups = choose.choice([1, 1, 1, 2, 3])
    kernel, stride, pad, dilation = (
        [choose.choice(values) for _ in "hw"] for values in ([1, 2, 3], [1, 1, 2], [0, 1, 2], [1, 1, 2])
    )
    size = [choose.randint(d * (k - 1) + 1, d * (k - 1) + 6) for k, d in zip(kernel, dilation, strict=True)]
    return groups, groups * choose.randint(1, 40), groups * choose.randint(1, 40), kernel, stride, pad, dilation, size


def words_of(bits):
    """Bits (..., n) as words of 32, the first one lowest."""
    padded = F.pad(bits, (0, -bits.shape[-1] % 32)).unflatten(-1, (-1, 32)).long()
    return (padded << torch.arange(32)).sum(-1).to(torch.int64).to(torch.uint32)


@needs_compiler
def test_thousand_random_layers_of_signs_are_exact(kernels):
    """2,000 of them, 1,000 with each build: sums, signs and signs by integers, beside torch's convolution of signs."""
    choose, generator = random.Random(0), torch.Generator().manual_seed(0)
    for number in range(1000):
        groups, channels, outs, kernel, stride, pad, dilation, (height, width) = random_geometry(choose)
        a = torch.randint(0, 2, (1, channels, height, width), generator=generator)
        w = torch.randint(0, 2, (outs, channels // groups, *kernel), generator=generator)
        sums = F.conv2d(2.0 * a - 1, 2.0 * w - 1, None, stride, pad, dilation, groups)
        pool = number % 4 == 0 and min(sums.shape[2:]) > 1
        expected = (F.max_pool2d(sums, 2) if pool else sums)[0].permute(1, 2, 0)
        sides = expected.shape[:2]
        per_group = words_of(w.permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, (groups, -1)))
        blocks = (group[i : i + 16].permute(1, 2, 0) for group in per_group for i in range(0, len(group), 16))
        weights = torch.cat([block.flatten().view(torch.int32) for block in blocks])
        seen, out = words_of(a[0].permute(1, 2, 0)), torch.full((*sides, outs), 9.0)
        bits = torch.full((*sides, -(-outs // 32)), 0x55555555, dtype=torch.int32)
        alpha, numbers = torch.ones(outs), [height, width, channels, *sides, outs, *kernel, *stride, *pad, *dilation]
        layer = Layer(*numbers, groups, pool, Tail(alpha=alpha.data_ptr()))
        nothing, result = Map(None, 1, 0), Map(out.data_ptr(), 1, 0)
        arguments = ctypes.byref(layer), ctypes.c_void_p(weights.data_ptr()), ctypes.c_void_p(seen.data_ptr())
        kernels.biper_binary(*arguments, nothing, result, ctypes.c_void_p(bits.data_ptr()))
        assert torch.equal(out, expected)
        assert torch.equal(bits, words_of(expected >= 0).view(torch.int32))
        if groups > 1:  # whose signs are always those of floats
            continue
        least = torch.randint(-9, 10, (outs,), dtype=torch.int16, generator=generator)
        turned = torch.randint(0, 2, (outs,), generator=generator)
        words = words_of(turned[None])
        layer.tail = Tail(integers=least.data_ptr(), turned=words.data_ptr())
        kernels.biper_binary(*arguments, nothing, nothing, ctypes.c_void_p(bits.data_ptr()))
        assert torch.equal(bits, words_of((expected >= least) ^ turned.bool()).view(torch.int32))


def test_integer_thresholds_are_exact_for_every_sum(tmp_path):
    """Every sum that nine taps of 24 channels can have, with gains of both signs and channels that never change."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = BinaryConv2d(24, 40, 3)
            self.norm, self.last = nn.BatchNorm2d(40), BinaryConv2d(40, 16, 1)

        def forward(self, x):
            return self.last(F.hardtanh(self.norm(self.conv(x)))).mean((2, 3))

    net = Net().eval()
    net.conv.alpha.data.normal_()
    net.norm.weight.data.normal_()
    net.norm.bias.data.normal_(0, 3)
    net.norm.running_mean.normal_(0, 30)
    net.norm.bias.data[:2] = torch.tensor([1e6, -1e6])
    net.conv.alpha.data[2], net.norm.weight.data[2], net.norm.bias.data[2] = 1, -1, 0
    net.norm.running_mean[2] = -215.5  # the lowest sum alone gives +1
    biper.binarize_(net)
    packed = pack(net)
    example = torch.zeros(1, 24, 3, 3)
    call = next(c for c in plan_of(packed, example) if c.kind == "binary" and c.out is None)
    least, turned = integer_thresholds(call)
    conv, norm = packed.network.conv, packed.network.norm
    sums = torch.arange(-216.0, 217.0)
    floats = norm((sums * conv.alpha.flatten()[:, None])[None, :, :, None])[0, :, :, 0] >= 0
    integers = (sums >= least[:, None]) ^ turned[:, None]
    assert torch.equal(floats, integers)
    assert turned.any()
    assert not turned.all()


def plan_of(packed, example):
    """The calls for inputs other than images of three channels."""
    from torch import fx

    from biper.nn.graph import trace
    from biper.packed.c.plan import Numbers, _Planner
    from biper.packed.compile import WHOLE

    graph = trace(packed.network, leaves=WHOLE, fresh=WHOLE)
    Numbers(fx.GraphModule(packed.network, graph)).run(example)
    return _Planner(packed.network, graph, "float32").plan().calls


@needs_compiler
def test_integers_along_the_skips_stay_near(shipped, tmp_path):
    images = normalized(shipped, pixels_of(32))
    expected = shipped(images)
    differences = []
    for skips in ("int16", "int8"):
        made = export_c(shipped, tmp_path / skips, skips=skips, calibration=[images])
        found = NativeNetwork(shipped, made, tmp_path / skips)(images)
        differences.append((found - expected).abs().mean().item())
    assert 0 < differences[0] < differences[1] < expected.std().item() / 2


@needs_compiler
def test_the_makefile_and_inputs_that_are_no_images(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "made")
    subprocess.run(["make", "-s", "-C", str(place)], check=True)
    for given, data, message in (
        ([], bytes(100), b"error: the input ends within an image: images have 3072 bytes\n"),
        ([], b"", b"error: the input ends before the first image: images have 3072 bytes\n"),
        (["photo.png"], b"", b"error: photo.png: images of 3072 bytes come from the standard input, "),
    ):
        done = subprocess.run([place / "network", *given], input=data, capture_output=True, text=False)
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.startswith(message)


@needs_compiler
def test_the_command_compares_and_says_what_it_did(trained, command, tmp_path):
    checkpoint = trained / "stage2/model_best.pth.tar"
    code, out, err = command(checkpoint, "--c", tmp_path / "c", entry=export_main)
    assert code == 0, err
    assert "images the classes of" in out + err
    assert "top-1 of the C" in out + err
    assert {path.name for path in (tmp_path / "c").iterdir()} == {path.name for path in FILES.iterdir()}
    code, out, err = command(checkpoint, "--c", tmp_path / "c8", "--skips", "int8", entry=export_main)
    assert code == 0, err
    assert "along the skips as int8" in out + err


def test_scales_are_measured_on_training_images():
    given = {"dataset": "digits", "batch_size_test": 100}
    settings = make_settings("cifar10", 2, given)
    model = biper.create_model("resnet20_1w1a", stage=2)
    images = torch.cat(list(_calibration(pack(model.eval()), settings, "int8")))
    loaders = build_loaders(settings, torch.device("cpu"), train=False)
    tested = {image.numpy().tobytes() for batch, _ in loaders.test.epoch() for image in batch}
    assert len(images) == 500
    assert not any(image.numpy().tobytes() in tested for image in images)


def test_bad_input_is_one_line_and_writes_nothing(trained, command, tmp_path):
    stage2 = trained / "stage2/model_best.pth.tar"
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    cases = {
        (trained / "stage1/model_best.pth.tar", "--c", tmp_path / "new"): "real",
        (stage2, "--c", full): "is not empty",
        (stage2, "--c", full / "file"): "is a file",
        (stage2, "--c", tmp_path / "no/where"): "no such folder",
        (stage2,): "nothing to write",
        (SHIPPED, "--c", tmp_path / "new", "--skips", "int8"): "needs training images, for its scales",
        (SHIPPED, "--c", tmp_path / "new", "--data_path", tmp_path / "none"): "--data_path",
        (stage2, "--skips", "int8", "-o", tmp_path / "x.safetensors"): "--c DIR",
        (stage2, "--facts", tmp_path / "x.json", "--c", tmp_path / "new"): "-o FILE",
    }
    for arguments, text in cases.items():
        code, _, err = command(*arguments, entry=export_main)
        assert code == 2
        assert text in err
        assert len(err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    assert (full / "file").read_text() == "mine"


class Own(nn.Module):
    """A binary convolution and something behind it."""

    def __init__(self, **layers):
        super().__init__()
        self.conv = BinaryConv2d(3, 16, 3, weight_quantizer=biper.SquareWave(20.0))
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.names = list(layers)

    def forward(self, x):
        x = self.conv(x)
        for name in self.names:
            x = getattr(self, name)(x)
        return x.flatten(1)


class Rows(nn.Module):
    def forward(self, x):
        return x.reshape(-1, 16)


class OtherMean(nn.Module):
    def forward(self, x):
        return x.mean((1, 2))


class Whole(nn.Module):
    def forward(self, x):
        return x[:, :, None]


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ({"pool": nn.LPPool2d(2, 2)}, r"layer pool \(LPPool2d\)"),
        ({"relu": nn.LeakyReLU()}, r"layer relu \(LeakyReLU\)"),
        ({"mean": nn.AdaptiveMaxPool2d(1)}, r"layer mean \(AdaptiveMaxPool2d\)"),
        ({"same": nn.Conv2d(16, 8, 3, padding="same")}, r"layer same \(Conv2d\)"),
        ({"mirror": nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect")}, r"layer mirror \(Conv2d\)"),
        ({"last": nn.Linear(6, 6)}, r"layer last \(Linear\)"),
        ({"rows": Rows()}, "the operation reshape"),
        ({"other": OtherMean()}, "the operation mean"),
        ({"slide": nn.AvgPool2d(6, divisor_override=3)}, "the operation avg_pool2d"),
        ({"norm": nn.GroupNorm(2, 16)}, r"layer norm \(GroupNorm\)"),
        ({"whole": Whole()}, "getitem"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_c_does_not_know_is_named(layers, named, tmp_path):
    with pytest.raises(UsageError, match=named):
        export_c(pack(Own(**layers).eval()), tmp_path / "c", image_size=8)
    assert not list(tmp_path.iterdir())


def test_layers_that_compute_in_their_own_way_and_odd_numbers_are_refused(tmp_path):
    class Doubled(BinaryConv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.warns(UserWarning, match="way of their own"):
        packed = pack(Own(own=Doubled(16, 8, 3, weight_quantizer=biper.SquareWave(20.0))).eval())
    with pytest.raises(UsageError, match=r"layer own \(Doubled\)"):
        export_c(packed, tmp_path / "c", image_size=8)
    net = Own().eval()
    net.conv.alpha.data[0] = torch.nan
    with pytest.raises(UsageError, match="not finite"):
        export_c(pack(net), tmp_path / "c", image_size=8)
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_a_mean_by_a_module_is_known(tmp_path):
    net = Own(mean=nn.AvgPool2d(6, stride=1)).eval()
    packed = pack(net)
    native = NativeNetwork(packed, export_c(packed, tmp_path / "c", image_size=8), tmp_path / "c")
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(native(images), packed(images))
