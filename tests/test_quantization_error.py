import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import biper
from biper.commands.quantization_error import main as quantization_error_main
from biper.experiments.plots import plot_quantization_error, weight_histograms
from biper.nn.quantization_error import format_table, layer_error
from biper.nn.quantizers import Sine


@pytest.mark.parametrize("x", [0.3, 1.0, 2.0])
def test_laplace_weights_against_the_closed_form(x):
    freq, n = 20.0, 4_000_000
    w = torch.from_numpy(np.random.default_rng(0).laplace(0, x / freq, n))
    g = x / (1 + x * x) / math.tanh(math.pi / (2 * x))
    error = layer_error("w", w, Sine(freq))
    assert error.scale == pytest.approx(g, abs=1e-3)
    assert error.l1 == pytest.approx(1 - g, abs=1e-3)
    assert error.squared == pytest.approx(2 * x * x / (1 + 4 * x * x) - g * g, abs=1e-3)
    assert error.freq_std == pytest.approx(x * math.sqrt(2), rel=1e-2)
    assert error.mean_abs == pytest.approx(x / freq, rel=1e-2)
    assert error.past_quarter == pytest.approx(math.exp(-math.pi / (2 * x)), abs=1e-3)


def test_sums_are_the_published_ones():
    model = biper.create_model("resnet20_1w1a", freq=20.0)
    error = biper.quantization_error(model)
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, biper.BinaryConv2d)]
    sines = [torch.sin(20 * w) for w in weights]
    assert len(error.layers) == 18
    assert error.qe == pytest.approx(sum((s - s.sign()).abs().mean().item() for s in sines), rel=1e-6)
    assert error.b == pytest.approx(sum(w.abs().mean().item() for w in weights), rel=1e-6)
    shares = [((s - s.abs().mean() * s.sign()).square().mean() / s.square().mean()).item() for s in sines]
    assert error.relative == pytest.approx(sum(shares) / 18, rel=1e-5)


def test_both_stages_of_the_same_weights_have_the_same_error():
    one, two = (biper.create_model("resnet20_1w1a", stage=s) for s in (1, 2))
    two.load_state_dict(one.state_dict())
    assert biper.quantization_error(one) == biper.quantization_error(two)


def test_histograms_are_shares_of_all_weights():
    names, rows, limit = weight_histograms(biper.create_model("resnet20_1w1a"))
    assert (names[0], rows.shape, limit) == ("layer1.0.conv1", (18, 61), 1.0)
    np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("quantizer", [biper.XNOR(), biper.IRNet(), biper.ReCU(), biper.Sign()], ids=lambda q: q.name)
def test_the_error_of_others_is_that_of_their_own_weights(quantizer, tmp_path):
    model = biper.create_model("resnet20_1w1a", weight_quantizer=quantizer)
    w, error = model.layer2[1].conv1.weight, {e.name: e for e in biper.quantization_error(model).layers}
    layer = model.layer2[1].conv1.weight_quantizer
    real, effective = layer.real(w), layer.effective(w)
    assert error["layer2.1.conv1"].l1 == pytest.approx((real - effective).abs().mean().item())
    assert error["layer2.1.conv1"].scale == pytest.approx(real.abs().mean().item())
    assert format_table(biper.quantization_error(model)).splitlines()[1].split()[-3:] == ["-", "-", "-"]
    assert weight_histograms(model)[2] == 4.0
    plot_quantization_error([("one", model)], tmp_path / "qe.png")
    assert (tmp_path / "qe.png").exists()


@pytest.mark.parametrize("count", [1, 3])
def test_plot(tmp_path, count, monkeypatch):
    panels, write = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda own, *args, **how: (panels.extend(own.axes), write(own, *args, **how))
    )
    models = [(f"checkpoint {i}", biper.create_model("resnet20_1w1a", freq=10.0 + i)) for i in range(count)]
    plot_quantization_error(models, tmp_path / "qe.png")
    assert (tmp_path / "qe.png").read_bytes()[:4] == b"\x89PNG"
    assert [panel.has_data() for panel in panels] == [True] * (2 * count + 1)  # the last one tells the colours


def test_command(trained, tmp_path, command):
    files = [trained / stage / "model_best.pth.tar" for stage in ("stage1", "stage2")]
    picture, table = tmp_path / "qe.png", tmp_path / "qe.csv"
    code, out, err = command(*files, "--plot", picture, "--csv", table, entry=quantization_error_main)
    assert (code, err) == (0, "")
    error = biper.quantization_error(biper.load_checkpoint(files[1]))
    assert f"QE = {error.qe:.6f}   b = {error.b:.6f}" in out
    rows = table.read_text().splitlines()
    assert len(rows) == 1 + 2 * 18
    assert command(files[0], "--plot", tmp_path / "qe.PNG", entry=quantization_error_main)[0] == 0
    assert float(rows[-1].split(",")[3]) == error.layers[-1].l1
    assert picture.stat().st_size > 10_000


def test_bad_input(trained, tmp_path, command, refused):
    good = trained / "stage1" / "model_best.pth.tar"
    refused(tmp_path / "none", entry=quantization_error_main)
    contents = {"state_dict": biper.create_model("resnet20_32w32a").state_dict(), "model": "resnet20_32w32a"}
    torch.save(contents, tmp_path / "twin")
    code, out, err = command(good, tmp_path / "twin", "--freq", "20", entry=quantization_error_main)
    assert (code, "is left out: resnet20_32w32a" in err, out.count("QE = ")) == (0, True, 1)
    code, _, err = command(tmp_path / "twin", "--freq", "20", entry=quantization_error_main)
    assert (code, "no checkpoint with binarized layers" in err) == (2, True)
    refused(entry=quantization_error_main)
    refused(good, "--freq", "30", entry=quantization_error_main)
    assert "no such folder" in refused(good, "--csv", tmp_path / "no" / "qe.csv", entry=quantization_error_main)
    assert "no such folder" in refused(good, "--plot", tmp_path / "no" / "qe.png", entry=quantization_error_main)
    assert "cannot write" in refused(good, "--plot", tmp_path / "qe.nonsense", entry=quantization_error_main)


def test_only_files_of_their_own_kind_are_replaced(trained, tmp_path, command, refused, small_disk):
    own, table, picture = (tmp_path / name for name in ("own.png", "qe.csv", "qe.png"))
    own.write_bytes((trained / "stage1" / "model_best.pth.tar").read_bytes())  # a name alone is no kind
    table.write_text("mine,too\n1,2\n")
    picture.write_text("mine")
    before = {path: path.read_bytes() for path in (own, table, picture)}
    for flag, path in (("--csv", own), ("--plot", own), ("--csv", table), ("--plot", picture)):
        assert f"{path} exists and is another" in refused(own, flag, path, entry=quantization_error_main)
    assert "--csv and --plot are both" in refused(
        own, "--csv", "x.png", "--plot", "x.png", entry=quantization_error_main
    )
    assert {path: path.read_bytes() for path in (own, table, picture)} == before
    table.unlink()
    picture.unlink()
    argv = (own, "--csv", table, "--plot", picture)
    for _ in range(2):
        assert command(*argv, entry=quantization_error_main)[0] == 0
    before = {path: path.read_bytes() for path in (own, table, picture)}
    for flag, path in (("--csv", table), ("--plot", picture)):
        with small_disk(1000):
            assert str(path) in refused(own, flag, path, entry=quantization_error_main)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_quantizers_error_is_that_of_the_weights_that_it_makes_binary():
    model = torch.nn.Sequential(biper.BinaryLinear(8, 8, weight_quantizer=biper.Sign()))
    (layer,), w = biper.quantization_error(model).layers, model[0].weight
    assert layer.l1 == pytest.approx((w - w.sign()).abs().mean().item())
    assert math.isnan(layer.freq_std)
    assert math.isnan(layer.past_quarter)
