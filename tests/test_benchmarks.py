"""The benchmarks run and print what they promise; their figures are for machines with nothing else to do."""

import multiprocessing
import sys

import pytest
import torch
from conftest import needs_compiler
from torch import nn

import biper
from benchmarks import busy, epoch, gradients, inference, peers, roofline, scaling, train_step, variants
from benchmarks.published import published_model
from benchmarks.variants import Case, eager, ours
from biper.errors import UsageError
from biper.models import create_model
from biper.packed import runtime
from biper.packed.compile import Segmented, traced
from biper.packed.lowering import Segment
from biper.training import acceleration, train

CPU = torch.device("cpu")


def test_a_training_step(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_step", "-b", "2", "--steps", "1", "--no-compilers", "--no-memory"])
    train_step.main()
    out = capsys.readouterr().out
    for name in ("eager", "ours", "ours, --no-compile", "twin, eager, bf16, channels-last", "bare convolutions"):
        assert f"| {name} |" in out
    assert "ours takes" in out


def test_peak_memory_counts_what_a_step_needs():
    case = Case("resnet20_1w1a", "cifar10", 2, 16, CPU)
    few = train_step.peak_memory(lambda: ours(case), case)
    assert 0 < few < train_step.peak_memory(lambda: lambda: torch.ones(2**28).sum(), case)


def test_the_published_formulation_has_the_same_parameters():
    torch.manual_seed(0)
    one = published_model("resnet20_1w1a", "cifar10", 10, 2).state_dict()
    torch.manual_seed(0)
    two = create_model("resnet20_1w1a", stage=2).state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("build", "maker"), [(eager, "published_model"), (ours, "create_model")])
def test_a_step_changes_the_network(monkeypatch, build, maker):
    networks, make = [], getattr(variants, maker)
    monkeypatch.setattr(
        variants, maker, lambda *args, **options: networks.append(make(*args, **options)) or networks[0]
    )
    step = build(Case("resnet20_1w1a", "cifar10", 1, 2, CPU))
    before = [parameter.detach().clone() for parameter in networks[0].parameters()]
    step()
    assert not any(torch.equal(new, old) for new, old in zip(networks[0].parameters(), before, strict=True))


@needs_compiler
def test_gradients(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gradients", "-b", "4"])
    monkeypatch.setattr(gradients, "TRIES", 1)
    gradients.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| 1", "| 2"))]
    assert [row[1] for row in rows] == ["float32", "bf16"] * 2
    for row in rows:
        assert min(float(row[2]), float(row[3])) > (0.999999 if row[1] == "float32" else 0.9999)


@pytest.fixture
def restored(monkeypatch):
    """What the benchmark of an epoch puts its watches on."""
    for owner, name in (
        (acceleration.Accelerated, "forward"),
        (torch.Tensor, "backward"),
        (torch.optim.SGD, "step"),
        (acceleration, "fused_regularizer"),
        (acceleration, "periodic_regularizer"),
        (train, "run_epochs"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.mark.usefixtures("restored")
def test_an_epoch(monkeypatch, capsys):
    flags = "epoch -a resnet20_1w1a -b 10 --images 50 --tests 10"
    monkeypatch.setattr(sys, "argv", flags.split())
    epoch.main()
    assert "all that is not the model" in capsys.readouterr().out


def test_scaling(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [scaling.__file__, "-b", "4", "--steps", "1"])
    scaling.main()
    out = capsys.readouterr().out
    assert "| 4 | 1 |" in out
    assert "| 4 | 2 |" in out


@pytest.fixture
def threads():
    """torch's number of threads, which the benchmark of inference sets, is given back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_inference(monkeypatch, capsys, tmp_path):
    flags = "--batches 1 2 --threads 1 --rounds 1 --image_size 16 --no-compilers --no-memory"
    picture = tmp_path / "ways.png"
    argv = ["inference", "-a", "resnet20_1w1a", *flags.split(), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(inference, "SECONDS", 0.001)
    inference.main()
    lines = capsys.readouterr().out.splitlines()
    for name in ("packed", "training network", "twin", "twin, channels-last", "twin, bf16"):
        assert sum(line.startswith(f"| {name} |") for line in lines) == 2
    assert sum(line.startswith("Packed and training network predict the same") for line in lines) == 2
    assert sum(line.startswith("| 16 -> 16, 3x3, stride 1, on 16x16 | 6 |") for line in lines) == 2
    assert sum(line.startswith("| all | 18 |") for line in lines) == 2
    assert any(line.startswith("Size: ") for line in lines)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("threads")
def test_busy(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["busy", "-a", "resnet20_1w1a", "--rounds", "1", "--calls", "3"])
    monkeypatch.setattr(busy, "BATCHES", (1, 2))
    busy.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| 1 ", "| 2 "))]
    assert [row[1] for row in rows] == ["quiet", "after torch", "a core taken"] * 2
    assert all(number(cell.rstrip(" |")) > 0 for row in rows for cell in row[2:])
    assert not multiprocessing.active_children()


def test_inference_says_what_it_cannot_do(monkeypatch, tmp_path):
    for flags in (["-a", "resnet20_32w32a"], ["-a", "vgg_small_1w1a", "--image_size", "16"], ["--plot", "a.pnm"]):
        monkeypatch.setattr(sys, "argv", ["inference", *flags])
        with pytest.raises(UsageError):
            inference.main()
    case = Case("resnet20_1w1a", "cifar10", 2, 16, CPU)
    made = inference.networks(case)
    for name, network in made.items():  # as the process that measures its memory reads it
        inference.save(network, tmp_path / name)
        images = case.images()
        with torch.inference_mode():
            assert torch.equal(inference.load(name, tmp_path / name, case)(images), network(images))
    other = made | {"packed": made["twin"]}
    assert "for 16 images" in inference.agreement(made, case.images())
    with pytest.raises(UsageError, match="predicts another class"):
        inference.agreement(other, case.images())


@needs_compiler
def test_roofline(monkeypatch, capsys, tmp_path):
    if runtime.chosen() == runtime.TORCH:
        pytest.skip("needs the compiled instructions")
    picture = tmp_path / "roofline.png"
    flags = ["-a", "resnet20_1w1a", "--batches", "2", "--rounds", "1", "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", ["roofline", *flags])
    monkeypatch.setattr(roofline, "SECONDS", 0.0)
    roofline.main()
    rows = {cells[0]: cells[1:] for cells in table_of(capsys.readouterr().out)}
    assert rows["16 -> 16, 3x3, stride 1, on 32x32"][0] == "6"
    assert sum(int(row[0] or 0) for name, row in rows.items() if "->" in name and "real" not in name) == 18
    assert number(rows["all"][1]) > 0
    assert picture.stat().st_size > 10_000


def test_roofline_knows_what_an_instruction_does():
    network = biper.pack(nn.Sequential(biper.BinaryConv2d(64, 32, 3, padding=1, weight_quantizer=biper.Sign())))
    cut = Segmented(network.network, traced(network.network), torch.zeros(2, 64, 8, 4))
    (segment,) = (module for module in cut.owner.modules() if isinstance(module, Segment))
    signs, convolution = (work for work, _ in roofline.instructions(segment.compiled.code))
    assert signs == roofline.Work("tail", False, 0, 32 * 64 * 4 + 32 * 8)
    name, multiply_adds = "64 -> 32, 3x3, stride 1, on 8x4", 32 * 32 * 64 * 9
    assert convolution == roofline.Work(name, True, multiply_adds, 32 * 8 + 32 * 32 * 4 + 32 * 64 * 9 // 8)


def number(cell):
    """What a cell says: from a thousand on it has commas."""
    return float(cell.replace(",", ""))


def table_of(text):
    """The cells of a Markdown table's lines."""
    lines = (line.strip("| ").split("|") for line in text.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in cells] for cells in lines]


def test_peers(monkeypatch, capsys):
    flags = ["-a", "resnet20_1w1a", "--batches", "2", "--threads", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["peers", *flags, "--peers", "packed", "OpenVINO BinaryConvolution"])
    peers.main()
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in table[2:]] == ["| packed", "| OpenVINO BinaryConvolution"]
    assert table[2][3].startswith("1.00")
    assert table[3][1].startswith("not run: ") or number(table[3][1]) > 0


@pytest.mark.parametrize("name", ["resnet20_1w1a", "vgg_small_1w1a"])
def test_openvinos_binary_network_predicts_what_ours_does(name):
    pytest.importorskip("openvino")
    from benchmarks.openvino_network import compiled, openvino_model

    case = Case(name, "cifar10", 2, 3, CPU)
    network, images = inference.networks(case)["packed"], case.images()
    model, _kept = openvino_model(network, images)
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(compiled(model, 1)(images.numpy())), network(images))
