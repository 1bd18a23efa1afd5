"""ImageNet's archives, Tiny ImageNet's layout, and whole runs on them by the commands."""

import csv
import hashlib
import shutil
import sys
import tarfile

import pytest
from archives import add, imagenet_archives
from conftest import ROOT, RUN, WNIDS, photographs
from torchvision.datasets import imagenet as torchvision_imagenet

import biper
from biper.commands.prepare import main as prepare_main
from biper.data import imagenet
from biper.models.checkpoint import read_checkpoint
from biper.training.checkpoint import BEST


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """The three archives, and torchvision told of their MD5 sums."""
    folder = imagenet_archives(tmp_path)
    sums = {
        kind: (name, hashlib.md5((folder / name).read_bytes()).hexdigest())
        for kind, (name, _) in torchvision_imagenet.ARCHIVE_META.items()
    }
    monkeypatch.setattr(torchvision_imagenet, "ARCHIVE_META", sums)
    return folder


def files(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_the_archives_go_through_preparation_training_and_evaluation(archives, tmp_path, command):
    data, run = tmp_path / "data", tmp_path / "run"
    code, out, err = command("--archives", archives, "--data_path", data, entry=prepare_main)
    assert (code, out) == (0, f"imagenet is in {data}\n"), err
    for wnid in WNIDS:
        trained = sorted((tmp_path / "made" / "train" / wnid).iterdir())
        assert [f.read_bytes() for f in trained] == [f.read_bytes() for f in sorted((data / "train" / wnid).iterdir())]
        tested = {f.read_bytes() for f in (tmp_path / "made" / "val" / wnid).iterdir()}
        assert {f.read_bytes() for f in (data / "val" / wnid).iterdir()} == tested
    flags = [*RUN, "--data_path", data]
    code, out, err = command(*flags, "--epochs", 1, "--results_dir", run / "one", family="imagenet")
    assert code == 0, err
    assert "imagenet: 15 training and 6 test images of 32x32, 3 classes" in out
    start = ["--load_ckpt_stage1", run / "one" / BEST]
    flags = ["-b", 6, "-bt", 4, "--epochs", 1, "--workers", 0, "--results_dir", run / "two"]
    code, out, err = command(*flags, *start, family="imagenet", stage=2)
    assert code == 0, err
    assert "stage 2: resnet18_1w1a, freq 20" in out
    contents = read_checkpoint(run / "two" / BEST)
    row = next(csv.DictReader((run / "two" / "metrics.csv").read_text().splitlines()))
    assert (contents["best_prec1"], contents["best_prec5"]) == (float(row["test_top1"]), float(row["test_top5"]))
    assert (float(row["tau"]), float(row["train_regularizer"])) == (0, 0)  # off, whatever tau says
    code, out, err = command("-e", run / "two" / BEST, "--workers", 0, family=None, stage=None)
    assert code == 0, err
    assert f"top-1 {float(row['test_top1']):.2f} %" in out
    assert "(6 images)" in out
    m = biper.load_checkpoint(run / "two" / BEST).metadata
    assert (m.classes, m.image_size, m.family) == (tuple(WNIDS), 32, "imagenet")
    assert m.class_names == ("tench, Tinca tinca", "goldfish", "English springer")


def test_preparation_goes_on_where_it_was(archives, tmp_path, command, monkeypatch):
    data = tmp_path / "data"
    copy, count = imagenet._copy, 0

    def stopping(*args):
        nonlocal count
        count += 1
        if count == 8:  # in the middle of the second class
            raise KeyboardInterrupt("SIGINT")
        copy(*args)

    monkeypatch.setattr(imagenet, "_copy", stopping)
    assert command("--archives", archives, "--data_path", data, entry=prepare_main)[0] == 130
    assert [p.name for p in sorted((data / "train").iterdir()) if p.name[0] != "."] == ["n01440764"]
    before = (data / "train" / "n01440764").stat().st_mtime_ns
    monkeypatch.setattr(imagenet, "_copy", copy)
    assert command("--archives", archives, "--data_path", data, entry=prepare_main)[0] == 0
    assert (data / "train" / "n01440764").stat().st_mtime_ns == before
    whole = files(data)
    assert not any(".part" in name for name in whole)
    assert command("--archives", archives, "--data_path", data, entry=prepare_main)[0] == 0  # nothing left to do
    assert files(data) == whole


def test_archives_that_are_missing_damaged_or_of_class_folders(archives, tmp_path, refused, command):
    data = tmp_path / "data"
    entry = {"entry": prepare_main}
    assert "no folder" in refused("--archives", tmp_path / "none", "--data_path", data, **entry)
    err = refused("--archives", tmp_path, "--data_path", data, **entry)
    assert "ILSVRC2012_img_train.tar (138 GB), ILSVRC2012_img_val.tar (6.3 GB), ILSVRC2012_devkit_t12" in err
    assert "image-net.org" in err
    kit = archives / "ILSVRC2012_devkit_t12.tar.gz"
    shutil.move(kit, tmp_path / "kit")
    assert "ILSVRC2012_devkit_t12.tar.gz (2.5 MB)" in refused("--archives", archives, "--data_path", data, **entry)
    assert not data.exists()
    (data / "val" / "n01440764").mkdir(parents=True)
    err = refused("--archives", archives, "--data_path", data, **entry)
    assert f"{data / 'val'} was not unpacked by this command" in err
    shutil.rmtree(data)
    shutil.move(tmp_path / "kit", kit)
    with (archives / "ILSVRC2012_img_train.tar").open("ab") as file:
        file.write(b"x")
    assert "ILSVRC2012_img_train.tar is damaged: its MD5" in refused(
        "--archives", archives, "--data_path", data, **entry
    )


def test_a_validation_archive_of_class_folders_needs_no_labels(tmp_path):
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for wnid in WNIDS:
            add(tar, f"val/{wnid}/ILSVRC2012_val_1.JPEG", wnid.encode())
    assert imagenet.has_class_folders(tmp_path / "val.tar")
    imagenet.unpack_val(tmp_path / "val.tar", tmp_path / "val", [])
    assert {p.name for p in (tmp_path / "val").iterdir()} == {*WNIDS, imagenet.DONE}


def test_published_commands_by_the_scripts(shell, tmp_path):
    """bash run_stage1.sh imagenet, run_stage2.sh imagenet, eval.sh and compute_QE.py on what they leave."""
    data = photographs(tmp_path / "data", train=6, test=2)
    flags = ["--data_path", data, "--image_size", 32, "-b", 6, "-bt", 4, "--epochs", 1, "--gpus", 0, "--workers"]
    first = shell("bash", ROOT / "run_stage1.sh", "imagenet", *flags, 1, "--tau_min", 0.85, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    second = shell("bash", ROOT / "run_stage2.sh", "imagenet", *flags, 0, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    best = tmp_path / "results" / "imagenet_resnet18_1w1a_stage2" / BEST
    result = shell("bash", ROOT / "eval.sh", best, "--workers", 0, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "(4 images)" in result.stdout
    table = shell(sys.executable, ROOT / "compute_QE.py", best, cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    assert "layer4.1.conv2" in table.stdout
