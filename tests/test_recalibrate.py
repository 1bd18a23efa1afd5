"""biper recalibrate: batch norm's statistics over the training images, by the final weights."""

import pytest
import torch
from conftest import TINY

import biper
from biper.commands.export import main as export_main
from biper.commands.main import main as biper_main
from biper.data.loaders import build_loaders
from biper.models.checkpoint import read_checkpoint
from biper.training.checkpoint import BEST
from biper.training.inheritance import evaluation

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture
def recalibrated(trained, command, tmp_path):
    """A checkpoint of stage 2, the file that was made of it, and what was said."""
    before = (trained / "stage2" / BEST).read_bytes()
    code, out, err = command("recalibrate", trained / "stage2" / BEST, "-o", tmp_path / "new.pth.tar", entry=biper_main)
    assert code == 0, err
    assert (trained / "stage2" / BEST).read_bytes() == before
    return trained / "stage2" / BEST, tmp_path / "new.pth.tar", out


def test_statistics_are_means_over_the_batches_and_the_rest_stays(recalibrated):
    old, new, _ = recalibrated
    network, config = evaluation(None, 2, {"evaluate": str(old), "batch_size": 256})
    train = build_loaders(config, torch.device("cpu")).train
    outputs = [network.conv1(images).detach().transpose(0, 1).flatten(1) for images, _ in train.epoch(0)]
    before, after = (read_checkpoint(path)["state_dict"] for path in (old, new))
    mean = torch.stack([x.mean(1) for x in outputs]).mean(0)
    variance = torch.stack([x.var(1) for x in outputs]).mean(0)
    torch.testing.assert_close(after["bn1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after["bn1.running_var"], variance, rtol=1e-4, atol=1e-5)
    assert after["bn1.num_batches_tracked"] == len(outputs) > 1
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert name.endswith(STATISTICS) or torch.equal(after[name], tensor), name
    assert not torch.equal(before["layer1.0.bn1.running_var"], after["layer1.0.bn1.running_var"])


def test_the_file_reaches_what_was_said_and_can_be_packed(recalibrated, command, tmp_path):
    old, new, out = recalibrated
    said = {line.split(":")[0]: line for line in out.splitlines() if line.startswith(("before", "after"))}
    for when, path in (("before", old), ("after", new)):
        top1 = read_checkpoint(path)["best_prec1"]
        assert f"top-1 {top1:.2f} %" in said[when]
        assert f"top-1 {top1:.2f} %" in command("-e", path, family=None)[1]
    packed = tmp_path / "packed.safetensors"
    assert command(new, "-o", packed, entry=export_main)[0] == 0
    x = torch.randn(3, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(biper.load_packed(packed)(x), biper.load_checkpoint(new)(x))
    again = tmp_path / "again.pth.tar"
    again.write_bytes(new.read_bytes())  # one of its own files may be replaced
    assert command("recalibrate", new, "-o", again, entry=biper_main)[0] == 0
    twice, once = (read_checkpoint(path)["state_dict"] for path in (again, new))
    assert all(torch.equal(twice[name], tensor) for name, tensor in once.items())


def test_stage_2_starts_from_a_recalibrated_stage_1_and_held_out_images_stay_out(command, tmp_path):
    one, new = tmp_path / "one", tmp_path / "new.pth.tar"
    assert command(*TINY, "--epochs", 1, "--validation", 200, "--results_dir", one)[0] == 0
    code, out, err = command("recalibrate", one / BEST, "-o", new, entry=biper_main)
    assert code == 0, err
    assert "1,237 training and 200 held-out training images" in out
    flags = ["--epochs", 1, "-b", 256, "--results_dir", tmp_path / "two", "--load_ckpt_stage1", new]
    code, out, err = command(*flags, stage=2)
    assert code == 0, err
    assert "200 held-out training images" in out


def test_bad_input(trained, refused, tmp_path):
    best, packed, other = trained / "stage2" / BEST, tmp_path / "packed.safetensors", tmp_path / "mine.txt"
    biper.save_packed(biper.pack(biper.load_checkpoint(best)), packed)
    other.write_text("mine")
    published = tmp_path / "published.pth.tar"
    torch.save({"state_dict": {}, "best_prec1": 1.0}, published)
    target, before = tmp_path / "new.pth.tar", best.read_bytes()
    own = tmp_path / "own.pth.tar"
    torch.save({**read_checkpoint(best), "recalibrated": True}, own)
    cases = {
        "CHECKPOINT and -o are both": [own, "-o", own],
        "no checkpoint at": [tmp_path / "none", "-o", target],
        "is packed: recalibrate the checkpoint": [packed, "-o", target],
        "mine.txt exists and was not written by recalibrate": [best, "-o", other],
        "model_best.pth.tar exists and was not written by recalibrate": [best, "-o", best],
        "new.safetensors has the name of a packed file": [best, "-o", tmp_path / "new.safetensors"],
        "does not say its stage": [published, "-o", target],
        "unrecognized arguments: --validation": [best, "-o", target, "--validation", 0],
        "no such folder": [best, "-o", tmp_path / "none" / "new.pth.tar"],
        "--batch_size 1": [best, "-o", target, "-b", 1],
        "required: -o/--output": [best],
        "contradicts": [best, "-o", target, "--dataset", "cifar10"],
    }
    for message, argv in cases.items():
        assert message in refused("recalibrate", *argv, entry=biper_main)
    assert not target.exists()
    assert (other.read_text(), best.read_bytes()) == ("mine", before)
