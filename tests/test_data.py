"""The data sets: digits, folders, CIFAR archives."""

import hashlib
import os
import pickle
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import biper.data.digits as digits_module
from biper.commands.download import main as download_main
from biper.data.cifar import READERS, read_cifar
from biper.data.datasets import DATASETS, REPOSITORY, MemorySet, StreamSet, default_data_path, find_dataset
from biper.data.digits import DIGITS, read_digits
from biper.data.folder import check_memory, read_folder
from biper.data.loaders import build_loaders
from biper.errors import UsageError
from biper.training.checkpoint import BEST
from biper.training.settings import Settings

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_is_described(name):
    for family in ("cifar10", "imagenet"):
        data = find_dataset(name, family)
        assert data.title
        assert len(data.mean) == len(data.std) == 3
        path = default_data_path(name)
        assert (path != REPOSITORY) == (data.needs_folder and name != "folder")
        if path != REPOSITORY:
            assert path.relative_to(REPOSITORY).parts[:2] == (data.family, "data")


def test_folders_are_held_in_memory_for_networks_of_cifar_and_streamed_for_those_of_imagenet():
    assert isinstance(find_dataset("folder", "cifar10"), MemorySet)
    assert isinstance(find_dataset("folder", "imagenet"), StreamSet)


def test_an_unknown_data_set_is_told_the_choices():
    with pytest.raises(UsageError, match="unknown data set 'mnist'; choose from cifar10, cifar100"):
        find_dataset("mnist")


def test_digits_are_split_once_and_stratified():
    train, test = read_digits(True, 32), read_digits(False, 32)
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    assert test.pixels.shape == (360, 32, 32, 3)
    shares = torch.bincount(test.labels) / torch.bincount(torch.cat([train.labels, test.labels]))
    assert (shares - 0.2).abs().max() < 0.01
    assert torch.equal(read_digits(False, 32).pixels, test.pixels)
    flat = {bytes(p.numpy().tobytes()) for p in read_digits(True, 8).pixels}
    assert sum(p.numpy().tobytes() in flat for p in read_digits(False, 8).pixels) < 5  # no leak into the test images


def test_digits_are_those_of_scikit_learn_wherever_its_file_lies(monkeypatch):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    split = train_test_split(range(1797), test_size=0.2, random_state=0, stratify=digits.target)
    for moved in (False, True):
        monkeypatch.setattr(digits_module, "find_spec", (lambda name: None) if moved else find_spec)
        for chosen, train in zip(split, (True, False), strict=True):
            images = read_digits(train, 8)
            assert torch.equal(images.labels, torch.from_numpy(digits.target[chosen]))
            grey = torch.from_numpy(digits.images[chosen] * 255 / 16).float().round()
            assert torch.equal(images.pixels[..., 0].float(), grey)


def test_digits_normalization_is_measured():
    pixels = read_digits(True, 8).pixels.float() / 255
    assert pixels.mean().item() == pytest.approx(DIGITS.mean[0], abs=0.003)
    assert pixels.std().item() == pytest.approx(DIGITS.std[0], abs=0.003)


def test_folder_reads_every_format_and_mode(image_folder):
    train = read_folder(image_folder, True, None, workers=2)
    assert train.classes == ("dark", "light")
    assert train.pixels.shape == (16, 10, 12, 3)
    assert train.labels.tolist() == [0] * 8 + [1] * 8
    means = train.pixels.float().mean(dim=(1, 2, 3))
    assert (means[:8] < 60).all()
    assert (means[8:] > 180).all()


def test_folder_takes_val_and_resizes(image_folder):
    os.rename(image_folder / "test", image_folder / "val")
    test = read_folder(image_folder, False, 8, workers=1)
    assert test.pixels.shape == (8, 8, 8, 3)


def test_folder_errors(image_folder):
    def error(**options):
        with pytest.raises(UsageError) as caught:
            read_folder(image_folder, options.pop("train", True), options.pop("size", None), workers=2)
        return str(caught.value)

    odd = image_folder / "train" / "light" / "odd.png"
    Image.new("RGB", (9, 9)).save(odd)
    assert "odd.png is 9x9, others 12x10" in error()
    odd.write_bytes(b"no image at all")
    assert str(odd) in error(size=8)
    odd.unlink()
    (image_folder / "test" / "third").mkdir()
    assert "third only in one of them" in error(train=False)
    (image_folder / "train" / "empty").mkdir()
    assert "no images in" in error()
    with pytest.raises(UsageError, match=rf"no folder train in .*; did you mean --data_path {image_folder}\?$"):
        read_folder(image_folder / "test", True, None, workers=1)
    os.rename(image_folder / "train", image_folder / "training")
    assert error().endswith("expected train/<class>/<image>")


def test_truncated_image_is_named(image_folder):
    victim = image_folder / "train" / "dark" / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (10, 12, 3), np.uint8)).save(victim)
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(UsageError, match=str(victim)):
        read_folder(image_folder, True, None, workers=2)


def test_more_images_than_memory():
    with pytest.raises(UsageError, match="smaller --image_size"):
        check_memory(Path("huge"), 2**60)


def test_loaders_of_a_folder(image_folder):
    config = Settings("cifar10", 1, dataset="folder", data_path=str(image_folder), image_size=8, batch_size=4)
    loaders = build_loaders(config, CPU)
    assert (loaders.classes, loaders.image_size) == (("dark", "light"), 8)
    assert (loaders.train.count, loaders.test.count) == (16, 8)
    assert loaders.train.augmentation.padding == 1
    assert build_loaders(config, CPU, train=False).train is None


def cifar_archive(path, monkeypatch, damaged=False):
    """An archive in CIFAR-10's layout with 20 random images, whose checksums torchvision is told."""
    reader = READERS["cifar10"]
    folder = path / reader.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    md5 = {}
    for name in [n for n, _ in reader.train_list + reader.test_list]:
        batch = {"data": random.integers(0, 256, (20, 3072), np.uint8), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    meta = folder / reader.meta["filename"]
    meta.write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    archive = path / reader.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, reader.base_folder)
    if not damaged:
        monkeypatch.setattr(reader, "train_list", [[n, md5[n]] for n, _ in reader.train_list])
        monkeypatch.setattr(reader, "test_list", [[n, md5[n]] for n, _ in reader.test_list])
        monkeypatch.setattr(reader, "meta", reader.meta | {"md5": hashlib.md5(meta.read_bytes()).hexdigest()})
        monkeypatch.setattr(reader, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive


def test_cifar_from_a_local_archive(tmp_path, monkeypatch, command):
    archive = cifar_archive(tmp_path / "made", monkeypatch)
    target = tmp_path / "data"
    code, out, err = command("--archive", archive, "--data_path", target, entry=download_main)
    assert (code, err) == (0, "")
    assert str(target) in out
    train, test = read_cifar("cifar10", target, True), read_cifar("cifar10", target, False)
    assert train.pixels.shape == (100, 32, 32, 3)
    assert test.labels.tolist() == [i % 10 for i in range(20)]
    assert test.classes[:2] == ("class0", "class1")
    batch = target / "cifar-10-batches-py" / "test_batch"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"no intact cifar10 in .*; to get it: biper download --dataset cifar10"):
        read_cifar("cifar10", target, False)
    (tmp_path / "train").mkdir()
    with pytest.raises(UsageError, match=r"; for images in folders of classes: --dataset folder$"):
        read_cifar("cifar10", tmp_path, False)


def test_foreign_archive_is_refused(tmp_path, monkeypatch, refused):
    archive = cifar_archive(tmp_path / "made", monkeypatch, damaged=True)
    err = refused("--archive", archive, "--data_path", tmp_path / "data", entry=download_main)
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    assert f"is not the original cifar-10-python.tar.gz: its MD5 is {md5}, not {READERS['cifar10'].tgz_md5}" in err
    assert not (tmp_path / "data").exists()
    refused("--archive", tmp_path / "missing.tar.gz", entry=download_main)


def test_files_that_are_not_the_published_ones_are_used_if_the_user_says_so(tmp_path, monkeypatch, command, refused):
    archive, target = cifar_archive(tmp_path / "made", monkeypatch, damaged=True), tmp_path / "data"
    code, _, _ = command("--archive", archive, "--data_path", target, "--accept_checksums", entry=download_main)
    assert code == 0
    flags = ["--data_path", target, "-a", "resnet20_1w1a", "-b", 50, "--epochs", 1, "--results_dir", tmp_path / "run"]
    md5 = hashlib.md5((target / "cifar-10-batches-py" / "data_batch_1").read_bytes()).hexdigest()
    named = f"data_batch_1 has the MD5 {md5}, not {READERS['cifar10'].train_list[0][1]}"
    assert "test_batch has the MD5" in refused(*flags)
    assert not (tmp_path / "run").exists()
    code, out, err = command(*flags, "--accept_checksums")
    assert code == 0, err
    assert f"cifar10 in {target} is not the published one, and is used all the same: {named}; " in out
    assert command("-e", tmp_path / "run" / BEST)[0] == 0  # what the run was told holds for its evaluation
    (target / "cifar-10-batches-py" / "data_batch_3").unlink()
    assert "data_batch_3 is missing" in refused(*flags, "--accept_checksums", "--save", "other")


class Harmful:
    """A pickle of it would call print."""

    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (pickle.dumps(Harmful()), "it holds a builtins.print"),
        (b"no pickle", "is damaged"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}), "N labels below"),
        (pickle.dumps({"data": np.zeros((2, 3072)), "labels": [0, 1]}), "expected N x 3072 bytes"),
        (pickle.dumps([1, 2]), "is no file of CIFAR"),
    ],
    ids=["code", "text", "labels", "pixels", "list"],
)
def test_no_file_that_is_read_runs_code_or_passes_for_images(tmp_path, monkeypatch, capsys, contents, message):
    cifar_archive(tmp_path, monkeypatch, damaged=True)
    test, meta = (tmp_path / "cifar-10-batches-py" / name for name in ("test_batch", "batches.meta"))
    test.write_bytes(contents)
    with pytest.raises(UsageError, match=message):
        read_cifar("cifar10", tmp_path, False, accept=True)
    meta.write_bytes(contents)
    with pytest.raises(UsageError, match=r"batches\.meta is"):
        read_cifar("cifar10", tmp_path, False, accept=True)
    assert "run" not in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("kind", ["outside", "link", "missing", "cut"])
def test_an_archive_writes_the_data_sets_files_alone(tmp_path, monkeypatch, command, kind):
    whole = cifar_archive(tmp_path / "made", monkeypatch, damaged=True)
    archive, target = tmp_path / "other.tar.gz", tmp_path / "data"
    with tarfile.open(whole) as old, tarfile.open(archive, "w:gz") as new:
        for member in old.getmembers():
            source = old.extractfile(member) if member.isfile() else None
            if member.name.endswith("data_batch_2") and kind in ("link", "missing"):
                member.type, member.linkname, source = tarfile.SYMTYPE, "/etc/passwd", None
                if kind == "missing":
                    continue
            member.name = f"./{member.name}"  # as tar writes it for a folder that is given so
            new.addfile(member, source)
        outside = tarfile.TarInfo("../outside")
        new.addfile(outside)
    if kind == "cut":
        archive.write_bytes(archive.read_bytes()[:-2000])
    flags = ["--archive", archive, "--data_path", target, "--accept_checksums"]
    code, _, err = command(*flags, entry=download_main)
    assert not (tmp_path / "outside").exists()
    if kind == "outside":
        assert (code, len(list((target / "cifar-10-batches-py").iterdir()))) == (0, 7)
    else:
        text = "is damaged" if kind == "cut" else "holds no file cifar-10-batches-py/data_batch_2"
        assert code == 2
        assert f"error: {archive} {text}" in err
        assert not target.exists()


def test_download_without_network_is_one_line(tmp_path, monkeypatch, refused):
    # the proxy of this test listens nowhere, so the attempt fails at once wherever the test runs
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(READERS["cifar10"], "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    assert "use --archive" in refused("--data_path", tmp_path / "data", entry=download_main)


def test_default_data_path_is_in_the_repository():
    assert default_data_path("cifar10").parts[-3:] == ("cifar10", "data", "CIFAR10")


@pytest.mark.skipif("BIPER_TEST_CIFAR10" not in os.environ, reason="BIPER_TEST_CIFAR10: a folder of CIFAR-10 images")
def test_real_cifar10_images():
    test = read_folder(Path(os.environ["BIPER_TEST_CIFAR10"]), False, None, workers=4)
    assert test.pixels.shape == (10_000, 32, 32, 3)
    assert torch.bincount(test.labels).tolist() == [1000] * 10
    mean = test.pixels.float().mean(dim=(0, 1, 2)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.494, 0.485, 0.450]), atol=0.005, rtol=0)
