"""The packed file: small, whole, and never trusted."""

import json
import random
import struct
import sys
from dataclasses import replace

import pytest
import torch
from conftest import TORCH
from safetensors.torch import load as read_tensors
from safetensors.torch import save_file

import biper
from biper.errors import UsageError
from biper.packed import file
from biper.packed.file import load_packed, save_packed
from biper.packed.pack import pack


def packed_network(name="resnet20_1w1a", family="cifar10", classes=10):
    model = biper.create_model(name, family=family, num_classes=classes, freq=20.0, stage=2).eval()
    model.metadata = replace(model.metadata, dataset="cifar10", mean=(0.5,) * 3, image_size=32)
    return pack(model)


@pytest.fixture
def saved(tmp_path):
    save_packed(packed_network(), tmp_path / "net.safetensors", top1=87.5)
    return tmp_path / "net.safetensors"


def reworked(path, change, **facts):
    """The file again, with other tensors and facts and a checksum that fits."""
    contents = path.read_bytes()
    (length,) = struct.unpack("<Q", contents[:8])
    header = json.loads(contents[8 : 8 + length])["__metadata__"]
    header |= {"sha256": file.UNSUMMED, "biper": json.dumps(json.loads(header["biper"]) | facts)}
    tensors = read_tensors(contents)
    change(tensors)
    save_file(tensors, path, header)
    contents = path.read_bytes()
    digest = file.hashlib.sha256(contents).hexdigest().encode()
    path.write_bytes(contents.replace(file.UNSUMMED.encode(), digest, 1))
    return path


@torch.no_grad()
def test_round_trip(saved):
    torch.manual_seed(0)
    network, x = packed_network(), torch.randn(2, 3, 32, 32)
    save_packed(network, saved, top1=12.5)
    found = file.read(saved)
    assert torch.equal(found.network(x), network(x))
    assert found.metadata == found.network.metadata == network.metadata
    assert found.top1 == 12.5
    assert torch.equal(load_packed(str(saved))(x), network(x))
    assert not found.network.training


def test_the_same_network_gives_the_same_file(saved):
    contents, network = saved.read_bytes(), load_packed(saved)
    for _ in range(20):  # safetensors itself gives each of six orders now and then
        save_packed(network, saved, top1=87.5)
        assert saved.read_bytes() == contents


@pytest.mark.parametrize(
    ("name", "family", "classes", "most"),
    [
        ("resnet18_1w1a", "cifar10", 10, 1_600_000),
        ("resnet20_1w1a", "cifar10", 10, 60_000),
        ("vgg_small_1w1a", "cifar10", 10, 1_100_000),
        ("resnet18_1w1a", "imagenet", 1000, 1.05 * (10_985_472 / 8 + 4 * 708_904)),  # its bits and real parameters
    ],
)
def test_sizes(name, family, classes, most, tmp_path):
    save_packed(packed_network(name, family, classes), tmp_path / "net.safetensors")
    assert (tmp_path / "net.safetensors").stat().st_size <= most


def test_a_thousand_damaged_files(saved):
    draw, contents = random.Random(0), saved.read_bytes()
    for number in range(1000):
        damaged = bytearray(contents)
        kind = number % 4
        if kind == 0:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            damaged = damaged[: draw.randrange(len(damaged))]
        elif kind == 2:
            start = draw.randrange(8000)  # where names, shapes and offsets are
            damaged[start : start + 4] = draw.randbytes(4)
        else:
            damaged += draw.randbytes(draw.randint(1, 100))
        if damaged == contents:
            continue
        saved.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"net\.safetensors") as caught:
            load_packed(saved)
        assert "\n" not in str(caught.value)


def test_newer_format(saved):
    with pytest.raises(UsageError, match="newer format than 2: update biper"):
        load_packed(reworked(saved, lambda tensors: None, format=file.FORMAT + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"layer1.0.conv1.bits": t["layer1.0.conv1.bits"][:, :2].clone()}),
            r"does not fit .*bits is",
        ),
        (lambda t: t.update({"linear.bias": t["linear.bias"].half()}), "linear.bias is .*float16"),
        (lambda t: t.pop("bn1.gain"), "bn1.gain is missing"),
        (lambda t: t.update({"more": torch.zeros(1)}), "more is .*expected nothing"),
    ],
)
def test_tensors_that_do_not_fit(saved, change, message):
    with pytest.raises(UsageError, match=message):
        load_packed(reworked(saved, change))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"model": "resnet99_1w1a"}, "unknown model"),
        ({"model": "resnet20_32w32a", "stage": 1}, "does not fit"),
        ({"num_classes": 10**5}, "does not fit"),
        ({"num_classes": 10**9}, "num_classes is 1000000000, not a whole number from 1 to 1000000"),
        ({"num_classes": "ten"}, "num_classes is 'ten', not a whole number"),
        ({"freq": -1.0}, "freq is -1.0, not a finite number above 0"),
        ({"colour": "red"}, "'colour', which is not known"),
        ({"class_names": ["cat"]}, "contradict"),
        ({"mean": "abc"}, "mean is 'abc', not a list of 0 or 3 values"),
        ({"mean": [0.5]}, r"mean is \[0.5\], not a list of 0 or 3"),
        ({"std": [0.0, 0.0, 0.0]}, "std is .*, each a finite number from 1e-06"),
        ({"image_size": 2**31}, "image_size is 2147483648, not a whole number from 1 to 4096"),
        ({"dataset": 3}, "dataset is 3, not a text of one line"),
    ],
)
def test_facts_that_are_wrong(saved, facts, message):
    with pytest.raises(UsageError, match=message):
        load_packed(reworked(saved, lambda tensors: None, **facts))


def test_files_of_others(tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(UsageError, match="cannot read"):
        load_packed(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match="damaged, or no packed network"):
        load_packed(path)
    save_file({"x": torch.zeros(1)}, path, {"kind": "other", "biper": '{"format": 1}', "sha256": ""})
    with pytest.raises(UsageError, match="it is a 'other'"):
        load_packed(path)


def test_a_network_that_could_not_be_loaded_is_not_saved(tmp_path):
    network = packed_network()
    network.network.linear = torch.nn.Linear(64, 5)
    with pytest.raises(UsageError, match=r"this network does not fit resnet20_1w1a: linear\.weight"):
        save_packed(network, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_quantizers_other_than_bipers_are_named_and_a_models_file_says_all(tmp_path):
    path, x = tmp_path / "net.safetensors", torch.randn(2, 3, 16, 16)
    model = biper.create_model("resnet20_1w1a", weight_quantizer=biper.Sign(), input_quantizer=biper.Sign())
    save_packed(pack(model), path)
    loaded = load_packed(path)
    assert loaded.metadata.weight_quantizer == loaded.metadata.input_quantizer == {"name": "sign"}
    with torch.no_grad():
        assert torch.equal(loaded(x), pack(model)(x))


def test_a_file_is_read_and_run_without_torchs_compiler(shell):
    """It takes seconds to load."""
    code = """
import sys, torch, biper
packed = biper.load_packed("pretrained_models/resnet20_1w1a/packed.safetensors")
with torch.inference_mode():
    packed(torch.zeros(1, 3, 32, 32))
print(sorted(name for name in sys.modules if name in ("torch._dynamo", "torch._inductor", "sympy", "torchvision")))
"""
    result = shell(sys.executable, "-c", code)
    assert (result.stdout, result.stderr) == ("[]\n" if TORCH > (2, 6) else "['sympy']\n", "")
