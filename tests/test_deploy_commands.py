"""export.py, predict.py, summary.py, and eval.sh on packed files, end to end."""

import copy
import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from PIL import Image

import biper
from biper.commands.export import main as export_main
from biper.commands.predict import main as predict_main
from biper.commands.quantization_error import main as quantization_error_main
from biper.commands.summary import main as summary_main
from biper.commands.train import main
from biper.data.digits import read_digits
from biper.models.checkpoint import read_checkpoint
from biper.packed import runtime as kernels
from biper.packed.costs import costs, total
from biper.packed.file import load_packed
from biper.packed.pack import pack
from biper.training.export import top1_of


@pytest.fixture(scope="module")
def exported(trained):
    target = trained / "net.safetensors"
    more = ["--onnx", str(trained / "net.onnx"), "--facts", str(trained / "packed.json")]
    export_main([str(trained / "stage2/model_best.pth.tar"), "-o", str(target), *more])
    return target


def score(text):
    return re.search(r"top-1 .*", text)[0]


def test_export_says_what_it_did(trained, command):
    target = trained / "again.safetensors"
    code, out, err = command(trained / "stage2/model_best.pth.tar", "-o", target, entry=export_main)
    assert code == 0, err
    assert "on 256 test images the predictions of 256 are equal" in out + err
    assert f"{target.stat().st_size:,} bytes" in out + err
    assert "times smaller than the network in float32" in out + err


def test_facts_are_those_of_the_files(trained, exported):
    facts = json.loads((trained / "packed.json").read_text())
    best = trained / "stage2/model_best.pth.tar"
    assert (facts["checkpoint"], facts["checkpoint_bytes"]) == (str(best), best.stat().st_size)
    assert (facts["packed"], facts["packed_bytes"]) == (str(exported), exported.stat().st_size)
    assert facts["onnx_bytes"] == (trained / "net.onnx").stat().st_size
    assert facts["times_smaller"] == facts["float32_bytes"] / facts["packed_bytes"] > 10
    assert facts["compared_on"] == "test images"
    assert (facts["agreement"]["images"], facts["agreement"]["equal"]) == (256, 256)
    assert [speed["images"] for speed in facts["speeds"]] == [1, 64]
    assert all(s["times_as_fast"] == s["float32_ms"] / s["packed_ms"] for s in facts["speeds"])
    assert facts["computes"] == load_packed(exported).describe()
    assert facts["versions"]["torch"] == torch.__version__


def test_the_quickstarts_summary_is_made_of_the_data(trained, exported, shell):
    result = shell(sys.executable, ROOT / "scripts" / "summarize_quickstart.py", trained)
    assert result.returncode == 0, result.stderr
    first, second, packed, speed = result.stdout.splitlines()
    for stage, line in ((1, first), (2, second)):
        top1 = read_checkpoint(trained / f"stage{stage}/model_best.pth.tar")["best_prec1"]
        assert f"best top-1 {top1:.2f} %, top-5 " in line
    assert f"{exported}, {exported.stat().st_size} bytes, " in packed
    facts = json.loads((trained / "packed.json").read_text())
    assert f"64 image(s), {facts['threads']} threads: {facts['speeds'][1]['packed_ms']:.2f} ms" in speed


def test_packed_file_knows_what_the_checkpoint_knew(trained, exported):
    from biper.packed.file import read

    float_network = biper.load_checkpoint(trained / "stage2/model_best.pth.tar")
    found = read(exported)
    assert found.metadata == float_network.metadata
    contents = torch.load(trained / "stage2/model_best.pth.tar", weights_only=True)
    assert found.top1 == contents["history"][-1]["test_top1"] == contents["best_prec1"]


@pytest.mark.parametrize("way", kernels.available())
def test_evaluation_equals_the_checkpoints(trained, exported, command, monkeypatch, way):
    monkeypatch.setenv(kernels.CHOICE, way)
    results = []
    for path in (trained / "stage2/model_best.pth.tar", exported):
        code, out, err = command("-e", path, family=None, stage=None)
        assert code == 0, err
        results.append(score(out + err))
    assert results[0] == results[1]


@torch.no_grad()
def test_onnx_gives_the_same_predictions(trained, exported):
    session = onnxruntime.InferenceSession(trained / "net.onnx")
    network = load_packed(exported)
    for batch in (1, 4):
        x = torch.randn(batch, 3, 8, 8)
        (logits,) = session.run(None, {"images": x.numpy()})
        assert np.array_equal(logits.argmax(1), network(x).argmax(1).numpy())
    model = onnx.load(trained / "net.onnx")
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    weights = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer]
    assert sum(w.ndim == 4 and set(np.unique(w)) == {-1.0, 1.0} for w in weights) == 18


def test_onnx_of_a_packed_file_is_that_of_its_checkpoint(trained, exported, command, tmp_path):
    code, out, err = command(exported, "--onnx", tmp_path / "net.onnx", entry=export_main)
    assert code == 0, err
    assert f"{(tmp_path / 'net.onnx').stat().st_size:,} bytes" in out + err
    x = np.random.default_rng(0).standard_normal((3, 3, 8, 8), dtype=np.float32)
    files = (trained / "net.onnx", tmp_path / "net.onnx")
    one, other = (onnxruntime.InferenceSession(file).run(None, {"images": x})[0] for file in files)
    assert np.array_equal(one, other)


def test_predictions_of_images(trained, exported, command, tmp_path):
    images, files = read_digits(False, 8), []
    for i in range(3):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(images.pixels[i].numpy()).save(files[-1])
    m = biper.load_checkpoint(trained / "stage2/model_best.pth.tar")
    x = ((images.pixels[:3] - 0.305 * 255) / (0.376 * 255)).permute(0, 3, 1, 2)
    expected = m(x).softmax(1).topk(5)
    for network in (exported, trained / "stage2/model_best.pth.tar"):
        code, out, err = command(network, *files, entry=predict_main)
        assert code == 0, err
        found = re.findall(r"^ +([\d.]+)%  (\d)$", out, re.MULTILINE)
        assert [int(name) for _, name in found] == expected.indices.flatten().tolist()
        percent = torch.tensor([float(p) for p, _ in found])
        torch.testing.assert_close(percent, 100 * expected.values.flatten().detach(), rtol=0, atol=0.006)


def test_predictions_of_a_folder_as_json_go_on_after_a_bad_image(exported, command, refused, tmp_path):
    grey, folder = read_digits(False, 8).pixels[0].numpy(), tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    upright, exif = Image.fromarray(grey), Image.Exif()
    exif[0x0112] = 6  # is to be turned by 90 degrees clockwise
    upright.save(folder / "a.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "below" / "turned.png", exif=exif)
    Image.fromarray(grey[..., 0].astype(np.uint16) << 8).save(folder / "c.png")
    Image.fromarray(np.dstack([grey, np.full((8, 8), 9, np.uint8)])).save(folder / "d.png")  # its alpha is left out
    Image.fromarray(grey[..., 0].astype(np.float32)).save(folder / "float.tif")
    Image.fromarray(grey[..., 0].astype(np.int32)).save(folder / "int.tif")
    (folder / "b.png").write_text("no image")
    (folder / "notes.txt").write_text("no image by its name")
    code, out, err = command(exported, folder, "--json", entry=predict_main)
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 2
    assert [Path(image["file"]).name for image in found] == ["a.png", "turned.png", "c.png", "d.png"]
    assert all(image["classes"] == found[0]["classes"] for image in found)
    assert sum(guess["probability"] for guess in found[0]["classes"]) <= 1
    bad = err.splitlines()
    assert [line.split(":")[:2] for line in bad] == [
        ["error", f" cannot read the image {folder / name}"] for name in ("b.png", "float.tif", "int.tif")
    ]
    assert all("its pixels are 32-bit numbers" in line for line in bad[1:])
    (tmp_path / "empty").mkdir()
    assert "no images in" in refused(exported, tmp_path / "empty", entry=predict_main)


@pytest.mark.parametrize(
    ("name", "family", "parameters"),
    [
        ("resnet20_1w1a", "cifar10", 270_522),
        ("resnet18_1w1a", "cifar10", 11_005_002),
        ("resnet18A_1w1a", "cifar10", 724_394),
        ("resnet18B_1w1a", "cifar10", 2_756_138),
        ("resnet18C_1w1a", "cifar10", 2_886_474),
        ("vgg_small_1w1a", "cifar10", 4_661_770),
        ("resnet18_1w1a", "imagenet", 11_694_376),
        ("resnet34_1w1a", "imagenet", 21_806_248),
        ("mobilenet_1w1a", "imagenet", 8_768_296),
    ],
)
def test_summary_counts_the_published_parameters(name, family, parameters, command):
    code, out, err = command(name, "--family", family, entry=summary_main)
    assert code == 0, err
    assert f"parameters: {parameters:,}, of which" in out


def test_summary_of_imagenets_resnet18_agrees_with_the_literature():
    """Bi-Real Net (ECCV 2018), table of memory and computation: 33.6 Mbit, 1.63e8 operations for its ResNet-18."""
    whole = total(costs(biper.create_model("resnet18_1w1a", family="imagenet", num_classes=1000), 224))
    assert whole.packed * 8 / 1e6 == pytest.approx(33.6, abs=0.1)
    assert whole.ops == pytest.approx(1.63e8, rel=0.01)


def test_summary_by_hand():
    layers = {layer.name: layer for layer in costs(biper.create_model("resnet20_1w1a"), 32)}
    stem, first = layers["conv1"], layers["layer1.0.conv1"]
    assert (stem.real, stem.flops, stem.bops, stem.float32) == (432, 432 * 32 * 32, 0, 4 * 432)
    assert (first.binary, first.real, first.bops) == (16 * 16 * 9, 16, 16 * 16 * 9 * 32 * 32)
    assert first.packed == 16 * 3 * 8 + 16 * 4  # 144 bits in three words, and alpha
    assert layers["linear"].flops == 640
    assert layers["bn1"].float32 == 4 * 4 * 16  # gain, bias, mean and variance
    real = total(costs(biper.create_model("resnet20_1w32a"), 32))
    assert real.bops == 0
    assert total(costs(biper.create_model("resnet20_32w32a"), 32)).binary == 0


def test_summary_of_a_network_with_one_class(command):
    code, out, err = command("resnet20_1w1a", "--num_classes", "1", entry=summary_main)
    assert (code, "(cifar10), 1 classes" in out) == (0, True), err
    title, stem = (line for line in out.splitlines() if line.startswith(("layer  ", "conv1 ")))
    assert title.index("output") == stem.index("16x32x32")  # texts begin below each other, and numbers end so
    assert title.index("binary") + len("binary") == stem.index(" 0 ") + 2


def test_summary_of_files(trained, exported, command):
    outs = [command(path, entry=summary_main)[1] for path in (exported, trained / "stage1/model_best.pth.tar")]
    assert outs[0] == outs[1]
    assert "images of 8x8" in outs[0]


def test_bad_input_of_export(trained, exported, refused, tmp_path):
    best = trained / "stage2/model_best.pth.tar"
    before = best.read_bytes()
    target, facts, foreign = tmp_path / "net.safetensors", tmp_path / "facts", trained / "facts.json"
    foreign.write_text('{"mine": 1}')
    cases = {
        "is of stage 1, whose weights are real: train stage 2": [trained / "stage1/model_best.pth.tar", "-o", target],
        "stage1/model_best.pth.tar is of stage 1": [trained / "stage1/model_best.pth.tar", "--c", tmp_path / "c"],
        "is packed already": [exported, "-o", target],
        "no checkpoint at": [tmp_path / "none", "-o", target],
        "net.safetensors cannot be written: no such folder": [best, "-o", tmp_path / "none" / "net.safetensors"],
        "it is a folder": [best, "-o", tmp_path],
        "another kind of file": [best, "-o", best],
        "exists and is another": [best, "-o", target, "--onnx", best],
        "-o and --onnx are both": [best, "-o", target, "--onnx", target],
        "--onnx and --facts are both": [best, "-o", target, *["--onnx", facts, "--facts", facts]],
        "facts.json cannot be written: no such folder": [
            best,
            "-o",
            target,
            "--facts",
            tmp_path / "none" / "facts.json",
        ],
        "facts.json exists and is another": [best, "-o", target, "--facts", foreign],
        "nothing to write: give one or more of -o FILE": [best],
        "--dataset says which images are compared": [exported, "--onnx", target, "--dataset", "digits"],
        "--data_path says which images are compared": [best, "--web", tmp_path / "page", "--data_path", tmp_path],
        "packed.json goes with the packed file": [exported, "--onnx", target, "--facts", tmp_path / "packed.json"],
    }
    for message, argv in cases.items():
        assert message in refused(*argv, entry=export_main)
    assert best.read_bytes() == before
    assert foreign.read_text() == '{"mine": 1}'
    assert not list(tmp_path.iterdir())


def test_onnx_without_its_packages(trained, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    best, target = trained / "stage2/model_best.pth.tar", tmp_path / "net.safetensors"
    assert "biper[onnx]" in refused(best, "-o", target, "--onnx", tmp_path / "net.onnx", entry=export_main)
    assert not list(tmp_path.iterdir())


def test_bad_input_of_the_others(trained, exported, refused, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no image")
    assert "cannot read the image" in refused(exported, text, entry=predict_main)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(exported.read_bytes()[:-5])
    assert "damaged" in refused("-e", damaged, family=None, stage=None)
    assert "contradicts" in refused("-e", exported, "--freq", "3", family=None, stage=None)
    assert "contradicts" in refused("-e", exported, "--dataset", "cifar10", family=None, stage=None)
    assert "contradicts" in refused("-e", exported, family="imagenet", stage=2)
    assert "packed network" in refused(exported, entry=quantization_error_main)
    assert "no file and no model" in refused("resnet99", entry=summary_main)
    assert "takes 32x32 images" in refused("vgg_small_1w1a", "--image_size", "64", entry=summary_main)
    assert "too small" in refused("resnet20_1w1a", "--image_size", "0", entry=summary_main)
    assert "--num_classes 0 is too small" in refused("resnet20_1w1a", "--num_classes", "0", entry=summary_main)
    assert "contradicts" in refused(exported, text, "--freq", "3", entry=predict_main)
    gone = refused(exported, tmp_path / "gone.png", entry=predict_main)
    assert gone.rstrip().endswith("cannot read the image " + str(tmp_path / "gone.png") + ": No such file or directory")
    assert "FILE: it is empty: is a variable of the shell not set?" in refused("", text, entry=predict_main)
    assert "IMAGE: it is empty" in refused(exported, "", entry=predict_main)
    assert "which says it" in refused(exported, "--family", "imagenet", entry=summary_main)


def test_untrained_networks_are_not_asked_what_they_see(refused, tmp_path):
    from biper.packed.file import save_packed

    save_packed(pack(biper.create_model("resnet20_1w1a", stage=2)), tmp_path / "net.safetensors")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert "how its images are normalized" in refused(
        tmp_path / "net.safetensors", tmp_path / "a.png", entry=predict_main
    )
    assert "does not say what data" in refused("-e", tmp_path / "net.safetensors", family=None, stage=None)


def test_export_without_the_data_compares_on_random_images(trained, command, refused, tmp_path, image_folder):
    contents = read_checkpoint(trained / "stage2/model_best.pth.tar")
    for part in ("metadata", "settings"):
        contents[part]["dataset"] = "folder"
    contents["settings"]["data_path"] = str(tmp_path / "gone")
    torch.save(contents, tmp_path / "moved.pth.tar")
    code, out, err = command(tmp_path / "moved.pth.tar", "-o", tmp_path / "net.safetensors", entry=export_main)
    assert code == 0, err
    assert "on 16 random images the predictions of 16 are equal" in out + err
    gone = ("--data_path", tmp_path / "gone")  # but images that were asked for must be there
    code, _, err = command(tmp_path / "moved.pth.tar", "-o", tmp_path / "other", *gone, entry=export_main)
    assert (code, "is not a folder" in err) == (2, True)
    for written in (["-o", tmp_path / "other"], ["--c", tmp_path / "c"]):
        text = refused(tmp_path / "moved.pth.tar", *written, "--data_path", image_folder, entry=export_main)
        assert "the checkpoint has 10 classes 0, 1, 2..., the data have 2 classes dark, light" in text


def test_a_difference_is_an_error_and_leaves_no_file(trained, command, tmp_path, monkeypatch):
    def wrongly_packed(network):
        wrong = copy.deepcopy(network)
        wrong.linear.bias.data[0] += 1e-3  # of a logit: so little changes few predictions
        return pack(wrong)

    monkeypatch.setattr("biper.training.export.pack", wrongly_packed)
    argv = (trained / "stage2/model_best.pth.tar", "-o", tmp_path / "net.safetensors")
    code, _, err = command(*argv, entry=export_main)
    assert code == 1
    assert "differs from the checkpoint" in err
    assert not list(tmp_path.iterdir())


def test_only_its_own_files_are_replaced(trained, exported, command, refused, tmp_path):
    best, packed, onnx_file = trained / "stage2/model_best.pth.tar", tmp_path / "a.safetensors", tmp_path / "a.onnx"
    packed.write_bytes(safetensors.torch.save({"theirs": torch.zeros(3)}))
    onnx_file.write_bytes(best.read_bytes())  # a name alone is no kind
    before = packed.read_bytes(), onnx_file.read_bytes()
    assert "a.safetensors exists and is another" in refused(best, "-o", packed, entry=export_main)
    for flag in ("--onnx", "--qonnx"):
        argv = (best, "-o", tmp_path / "b", flag, onnx_file)
        assert "a.onnx exists and is another" in refused(*argv, entry=export_main)
    assert (packed.read_bytes(), onnx_file.read_bytes()) == before
    packed.write_bytes(exported.read_bytes())
    onnx_file.write_bytes((trained / "net.onnx").read_bytes())
    code, _, err = command(best, "-o", packed, "--onnx", onnx_file, entry=export_main)
    assert code == 0, err


def test_what_stands_there_stays_whatever_fails(trained, exported, command, tmp_path, monkeypatch, small_disk):
    best, target = trained / "stage2/model_best.pth.tar", tmp_path / "a.safetensors"
    target.write_bytes(exported.read_bytes())
    with small_disk(1000):
        code, _, err = command(best, "-o", target, entry=export_main)
    assert (code, f"{target}: File too large" in err) == (2, True)
    monkeypatch.setattr("biper.training.export._same", lambda *_: False)
    code, _, err = command(best, "-o", target, entry=export_main)
    assert (code, "is left as it was" in err) == (1, True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == {target: exported.read_bytes()}


def test_accuracy_of_published_files():
    assert top1_of({"best_prec1": torch.tensor(87.5)}) == 87.5
    assert top1_of({}) is None


def test_scripts_run(shell, exported):
    for script, argv in (("export.py", ["--help"]), ("predict.py", ["--help"]), ("summary.py", ["resnet20_1w1a"])):
        result = shell("python", script, *argv)
        assert result.returncode == 0, result.stderr
    result = shell("bash", "eval.sh", exported)
    assert "packed" in result.stdout + result.stderr


def test_stage_2s_script_evaluates_packed_files(exported, capsys):
    main("cifar10", 2, ["-e", str(exported)])
    assert "top-1" in "".join(capsys.readouterr())
