"""Tiny ImageNet as it is downloaded, damaged images in whole runs."""

import os
import shutil

import pytest
import torch
from conftest import RUN, WNIDS, photographs
from PIL import Image

from biper.data.loaders import build_loaders
from biper.data.tiny_imagenet import list_tiny_imagenet
from biper.errors import UsageError
from biper.models.checkpoint import read_checkpoint
from biper.training.checkpoint import BEST, LATEST
from biper.training.settings import make_settings


@pytest.fixture
def tiny(tmp_path):
    """Tiny ImageNet in its original layout: three classes, four training and two validation images each."""
    made = photographs(tmp_path / "made", train=4, test=2, names=tuple(WNIDS), size=(64, 64))
    path = tmp_path / "tiny-imagenet-200"
    lines = []
    (path / "val" / "images").mkdir(parents=True)
    for wnid in WNIDS:
        (path / "train" / wnid / "images").mkdir(parents=True)
        (path / "train" / wnid / f"{wnid}_boxes.txt").write_text("no image")
        for file in (made / "train" / wnid).iterdir():
            shutil.copy(file, path / "train" / wnid / "images")
        for file in (made / "val" / wnid).iterdir():
            shutil.copy(file, path / "val" / "images")
            lines.append(f"{file.name}\t{wnid}\t0\t0\t62\t62\n")
    (path / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    (path / "words.txt").write_text("".join(f"{wnid}\t{words[0]}\n" for wnid, words in WNIDS.items()))
    return path


@pytest.mark.parametrize("inside", [True, False])
def test_tiny_imagenet_is_read_as_it_is(tiny, inside):
    path = tiny if inside else tiny.parent
    train, val = list_tiny_imagenet(path, True), list_tiny_imagenet(path, False)
    assert (len(train), len(val)) == (12, 6)
    assert train.classes == val.classes == tuple(WNIDS)
    assert val.names == ("tench", "goldfish", "English springer")
    for samples in (train, val):
        for i in range(len(samples)):
            assert samples.classes[samples.labels[i]] in os.path.basename(samples.path(i))
            Image.open(samples.path(i)).close()


def test_tiny_imagenet_that_is_not_whole(tiny):
    def error(train=False):
        with pytest.raises(UsageError) as caught:
            list_tiny_imagenet(tiny, train)
        return str(caught.value)

    annotations = tiny / "val" / "val_annotations.txt"
    whole = annotations.read_bytes()
    for broken in (b"", b"a b c\n", b"val_0.JPEG\n"):
        annotations.write_bytes(broken)
        assert "expected lines of file, tab, class" in error()
    annotations.write_bytes(b"\xff\xfe\n")
    assert "cannot read" in error()
    annotations.write_bytes(whole)
    next((tiny / "val" / "images").iterdir()).unlink()
    assert "1 images of" in error()
    shutil.rmtree(tiny / "train" / "n02102040")
    assert "names the class n02102040, which has no folder" in error()
    for file in (tiny / "train" / "n01443537" / "images").iterdir():
        file.unlink()
    (tiny / "train" / "n01443537" / "images" / ".DS_Store").write_text("hidden")
    assert "no images in" in error(train=True)
    shutil.rmtree(tiny / "val")
    assert "no Tiny ImageNet in" in error()


@pytest.mark.parametrize("loader", ["pillow", "dali"])
def test_a_run_on_tiny_imagenet(tiny, tmp_path, command, loader):
    use = []
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
        use = ["--use_dali"]
    flags = [*RUN, "--dataset", "tinyimagenet", "--data_path", tiny, *use]
    code, out, err = command(*flags, "--epochs", 1, "--results_dir", tmp_path / "run", family="imagenet")
    assert code == 0, err
    assert "12 training and 6 test images of 32x32, 3 classes" in out
    logged = (
        next(line for line in out.splitlines() if line.startswith("epoch 1/1  lr")).split("test loss ")[1].split()[0]
    )
    code, out, err = command("-e", tmp_path / "run" / BEST, family="imagenet", stage=2)
    assert code == 0, err
    assert f"loss {logged}  (6 images)" in out  # read as in training
    assert ("read with DALI" in out) == (loader == "dali")


def test_a_damaged_test_image_stops_a_run_and_loses_nothing(tmp_path, command, refused):
    data = photographs(tmp_path / "data", train=6, test=2)
    victim = data / "val" / "n01440764" / "n01440764_1.JPEG"
    kept = victim.read_bytes()
    flags = ["--dataset", "folder", "--data_path", data, *RUN, "--epochs", 1]
    assert command(*flags, "--results_dir", tmp_path / "whole", family="imagenet")[0] == 0
    victim.write_bytes(b"damaged")
    err = refused(*flags, "--results_dir", tmp_path / "run", family="imagenet")
    assert str(victim) in err
    assert "go on with --resume" in err
    assert str(victim) in refused("-e", tmp_path / "whole" / BEST, "--workers", 0, family=None, stage=None)
    victim.write_bytes(kept)
    code, out, err = command("--results_dir", tmp_path / "run", "--resume", family="imagenet")
    assert code == 0, err
    assert "going on after 0 of 1 epochs and 2 steps" in out  # all of them: only the evaluation is left
    whole, run = (read_checkpoint(tmp_path / name / LATEST) for name in ("whole", "run"))
    assert all(torch.equal(whole["state_dict"][key], value) for key, value in run["state_dict"].items())
    assert whole["history"] == run["history"]


def test_damaged_training_images_are_counted(tmp_path, command):
    data = photographs(tmp_path / "data", train=6, test=2)
    (data / "train" / "n01440764" / "n01440764_1.JPEG").write_bytes(b"damaged")
    flags = ["--dataset", "folder", "--data_path", data, *RUN, "--epochs", 2]
    code, out, err = command(*flags, "--results_dir", tmp_path / "run", family="imagenet")
    assert code == 0, err
    assert out.count("damaged image, another is taken: cannot read the image") == 1
    assert out.count("1 damaged images replaced") == 2
    assert "n01440764_1.JPEG" in (tmp_path / "run" / "logger.log").read_text()
    assert [row["train_replaced"] for row in read_checkpoint(tmp_path / "run" / LATEST)["history"]] == [1, 1]


@pytest.mark.skipif("BIPER_TEST_TINYIMAGENET" not in os.environ, reason="BIPER_TEST_TINYIMAGENET: tiny-imagenet-200")
def test_both_loaders_see_the_same_on_the_real_tiny_imagenet():
    pytest.importorskip("nvidia.dali")
    given = {"dataset": "tinyimagenet", "data_path": os.environ["BIPER_TEST_TINYIMAGENET"], "image_size": 64}
    configs = [make_settings("imagenet", 1, given | {"use_dali": dali, "workers": 2}) for dali in (False, True)]
    tests = [build_loaders(config, torch.device("cpu"), train=False).test for config in configs]
    for (x, k), (y, m) in zip(*(test.epoch() for test in tests), strict=True):
        assert torch.equal(k, m)
        torch.testing.assert_close(x, y, atol=0.03, rtol=0)
