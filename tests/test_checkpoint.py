import os
import pickle
import random
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import biper
from biper.errors import UsageError
from biper.files import atomically, folder_atomically
from biper.models.checkpoint import FORMAT, build_network, load_checkpoint, read_checkpoint
from biper.models.checksum import LABEL
from biper.training.checkpoint import save_checkpoint


def test_a_checkpoint_rebuilds_its_network(trained):
    path = trained / "stage2" / "model_best.pth.tar"
    model = biper.load_checkpoint(path)
    assert not model.training
    m = model.metadata
    assert (m.model, m.family, m.num_classes, m.freq, m.stage) == ("resnet20_1w1a", "cifar10", 10, 20.0, 2)
    assert (m.dataset, m.classes, m.image_size) == ("digits", tuple("0123456789"), 8)
    assert m.mean == (0.305,) * 3
    assert set(model.layer1[0].conv1.effective_weight().unique().tolist()) == {-1, 1}


def test_it_is_complete(trained):
    contents = read_checkpoint(trained / "stage1" / "checkpoint.pth.tar")
    assert contents["epoch"] == len(contents["history"]) == 3
    assert contents["best_prec1"] == max(row["test_top1"] for row in contents["history"])
    assert contents["settings"]["freq"] == 20
    assert contents["optimizer"]["state"]
    assert contents["lr_scheduler"]["last_epoch"] == 2
    assert set(contents["random_state"]) == {"python", "numpy", "torch", "cuda"}
    assert contents["versions"]["torch"] == torch.__version__
    assert contents["model"] == "resnet20_1w1a"


def test_contradictions_are_refused(trained):
    path = trained / "stage1" / "model_best.pth.tar"
    assert load_checkpoint(path, freq=20.0).metadata.freq == 20
    with pytest.raises(UsageError, match=r"freq 30\.0 contradicts .*freq 20\.0"):
        load_checkpoint(path, freq=30.0)
    with pytest.raises(UsageError, match="model resnet18_1w1a contradicts"):
        load_checkpoint(path, model="resnet18_1w1a")


def test_a_crash_while_saving_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.pth.tar"
    save_checkpoint({"state_dict": {}, "format": FORMAT}, path)
    before = path.read_bytes()

    class Unpicklable:
        def __reduce__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint({"state_dict": {}, "x": Unpicklable()}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pth.tar"]


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, small_disk):
    path = tmp_path / "c.pth.tar"
    save_checkpoint({"state_dict": {}}, path)
    before = path.read_bytes()
    with small_disk(1000), pytest.raises(OSError, match=r"File too large: '.*/c\.pth\.tar'$"):
        save_checkpoint({"state_dict": {"w": torch.zeros(1000)}}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pth.tar"]


@pytest.mark.parametrize("writes", [atomically, folder_atomically])
def test_errors_of_writing_name_what_was_to_be_written(tmp_path, writes, small_disk):
    with (
        small_disk(10),
        pytest.raises(OSError, match=r"File too large: '.*/mine'$"),
        writes(tmp_path / "mine") as place,
    ):
        (place / "part" if place.is_dir() else place).write_text("x" * 100)
    with pytest.raises(OSError, match=r"/mine cannot be written: encoder error$"), writes(tmp_path / "mine"):
        raise OSError("encoder error")
    with pytest.raises(OSError, match=r"No such file or directory: '/none'$"), writes(tmp_path / "mine"):
        os.stat("/none")
    assert os.listdir(tmp_path) == []


def test_replaced_never_shows_half_a_file(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with atomically(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth.tar"
    if how == "torch":
        torch.save({"state_dict": {}, "x": Attack()}, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": {}, "x": Attack()}))
    with pytest.raises(UsageError, match="evil") as caught:
        read_checkpoint(path)
    assert "could run code: refused" in str(caught.value) or how == "pickle"
    assert os.listdir(tmp_path) == ["evil.pth.tar"]


@pytest.mark.parametrize("size", [0, 1, 100, 5000, -1, -100])
def test_truncated_files(trained, tmp_path, size):
    path = tmp_path / "cut.pth.tar"
    path.write_bytes((trained / "stage1" / "model_best.pth.tar").read_bytes()[:size])
    with pytest.raises(UsageError, match=r"cut\.pth\.tar is damaged") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("contents", [b"hello", b"\x80\x04.", b"PK\x03\x04", b"\x00" * 1000, b"<html>"])
def test_foreign_files(tmp_path, contents):
    path = tmp_path / "foreign"
    path.write_bytes(contents)
    with pytest.raises(UsageError, match="foreign"):
        read_checkpoint(path)


def same(one, other):
    """Whether two values of checkpoints are equal, tensors included."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("kind", ["ours", "without a checksum of its own"])
def test_one_bit_that_flips_is_noticed(tmp_path, kind):
    """In torch's archives, which hold a CRC for each record, and in ours, which state a SHA-256 of everything."""
    contents = {"state_dict": {str(i): torch.randn(50) for i in range(5)}, "epoch": 3, "model": "x", "format": FORMAT}
    path = tmp_path / "c.pth.tar"
    save_checkpoint(contents, path) if kind == "ours" else torch.save(contents, path)
    whole, draw, refused = path.read_bytes(), random.Random(0), []
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(read_checkpoint(path), contents)
        except UsageError as error:
            refused.append(str(error))
    assert len(refused) > (350 if kind == "ours" else 100)  # the rest is padding
    assert all(line.startswith(f"{path} is damaged") and "\n" not in line for line in refused)


@pytest.mark.parametrize(("added", "times"), [(b"x", 1), (bytes(1), 22), (b"text ", 1000), (bytes(1), 100_000)])
def test_what_is_added_behind_a_checkpoint_is_noticed(tmp_path, added, times):
    path = tmp_path / "c.pth.tar"
    save_checkpoint({"state_dict": {"x": torch.arange(3)}, "epoch": 3, "model": "x", "format": FORMAT}, path)
    path.write_bytes(path.read_bytes() + added * times)
    with pytest.raises(UsageError, match=r"c\.pth\.tar is damaged"):
        read_checkpoint(path)


def test_others_may_speak_of_our_checksum(tmp_path):
    contents = {"state_dict": {"x": torch.arange(3)}, "epoch": 3, "model": LABEL.decode() + "0" * 64, "format": FORMAT}
    torch.save(contents, tmp_path / "c.pth.tar")
    assert same(read_checkpoint(tmp_path / "c.pth.tar"), contents)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refused(path, *_):  # as for users other than root
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "c.pth.tar").touch()
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(PermissionError, match="Permission denied"):
        read_checkpoint(tmp_path / "c.pth.tar")


def test_every_reader_of_torchs_files_reads_ours(tmp_path):
    save_checkpoint({"state_dict": {"x": torch.arange(3)}}, tmp_path / "c.pth.tar")
    for options in ({}, {"mmap": True}):
        assert torch.load(tmp_path / "c.pth.tar", weights_only=True, **options)["state_dict"]["x"].tolist() == [0, 1, 2]


def test_torchs_old_format_and_files_without_crcs_are_read(tmp_path):
    contents, path = {"state_dict": {"x": torch.arange(3)}}, tmp_path / "c.pth.tar"
    torch.save(contents, path, _use_new_zipfile_serialization=False)
    assert same(read_checkpoint(path), contents)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(contents, path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(read_checkpoint(path), contents)


def test_an_archive_that_would_fill_the_memory(tmp_path):
    torch.save({"state_dict": {"x": torch.zeros(10**6)}}, tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "plain") as plain, zipfile.ZipFile(tmp_path / "c", "w", zipfile.ZIP_DEFLATED) as c:
        for record in plain.infolist():
            c.writestr(record.filename, plain.read(record))
    with pytest.raises(UsageError, match="is damaged"):
        read_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(trained, tmp_path, value):
    path = tmp_path / "c.pth.tar"
    contents = read_checkpoint(trained / "stage1" / "model_best.pth.tar")
    contents["state_dict"]["layer1.0.conv1.weight"][0, 0, 0, 0] = value
    save_checkpoint(contents, path)
    with pytest.raises(UsageError, match=r"c\.pth\.tar holds .*: layer1\.0\.conv1\.weight is not finite"):
        load_checkpoint(path)


def test_what_is_no_checkpoint(tmp_path):
    path = tmp_path / "x.pth"
    for contents in ([1], {"a": 1}, {"state_dict": 3}, torch.zeros(2)):
        torch.save(contents, path)
        with pytest.raises(UsageError, match="has no state_dict"):
            read_checkpoint(path)
    for state in ({1: torch.zeros(1)}, {"a": [1]}):
        torch.save({"state_dict": state}, path)
        with pytest.raises(UsageError, match="more than named tensors"):
            read_checkpoint(path)
    torch.save({"state_dict": {}, "format": FORMAT + 1}, path)
    with pytest.raises(UsageError, match="update biper"):
        read_checkpoint(path)
    torch.save({"state_dict": {}, "format": FORMAT}, path)
    with pytest.raises(UsageError, match="no readable metadata"):
        load_checkpoint(path)
    (tmp_path / "own.pth.tar").touch()
    with pytest.raises(UsageError, match=r"that is a folder, which has own\.pth\.tar"):
        read_checkpoint(tmp_path)
    with pytest.raises(UsageError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "none")


def test_weights_that_do_not_fit_are_listed(trained):
    path = trained / "stage1" / "model_best.pth.tar"
    contents = read_checkpoint(path)
    contents["state_dict"]["extra"] = torch.zeros(1)
    contents["state_dict"]["conv1.weight"] = torch.zeros(1)
    del contents["state_dict"]["bn1.weight"]
    with pytest.raises(UsageError, match=r"bn1.weight missing \(1\); extra unexpected \(1\); conv1.weight of another"):
        build_network(contents, path)


def test_loading_warns_of_nothing(trained):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(trained / "stage1" / "model_best.pth.tar")
