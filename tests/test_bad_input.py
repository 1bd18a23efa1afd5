"""Bad input: one line, exit code 2, no traceback, nothing written."""

import shutil
import sys

import pytest
import torch
from conftest import TINY, photographs

from biper.commands.arguments import Parser
from biper.models.checkpoint import read_checkpoint
from biper.training.checkpoint import BEST, LATEST


@pytest.fixture
def nothing_written(tmp_path, monkeypatch):
    """An empty working directory that is empty afterwards."""
    work = tmp_path / "here"
    work.mkdir()
    monkeypatch.chdir(work)
    yield work
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-b", "0"], "--batch_size 0 is too small: at least 2"),
        (["-b", "many"], "invalid int value: 'many'"),
        (["--gpus", "7"], "GPU 7 is not there"),
        (["--gpus", "a"], "GPUs are given as numbers"),
        (["--device", "tpu"], "unknown --device 'tpu'"),
        (["-a", "resnet19_1w1a"], "unknown model 'resnet19_1w1a'; choose from"),
        (["--dataset", "mnist"], "choose from"),
        (["--freq", "-1"], "--freq -1.0 is too small"),
        (["--lr", "nan"], "not a finite number"),
        (["--tau", "1", "--tau_min", "1"], "--tau sets both"),
        (["--lr_type", "step"], "needs --lr_decay_step"),
        (["--load_ckpt_stage1", "x"], "is for stage 2"),
        (["--config", "none.yaml"], "cannot read --config none.yaml"),
        (["--frequency", "1"], "unrecognized arguments"),
        (["-e", "none.pth.tar"], "no checkpoint at none.pth.tar"),
        (["-a", "vgg_small_1w1a"], "vgg_small takes 32x32 images"),
    ],
)
def test_flags(refused, nothing_written, argv, message):
    assert message in refused(*TINY, *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "cifar10", "--data_path", "none"], "none: --data_path is not a folder"),
        (["--dataset", "folder", "--data_path", "none"], "none: --data_path is not a folder"),
        (["--dataset", "folder"], "needs --data_path"),
        (["--dataset", "folder", "--data_path", "."], "no folder test or val"),
        (["--dataset", "cifar10", "--data_path", "."], "biper download --dataset cifar10"),
        (["--dataset", "cifar100", "--image_size", "16"], "has 32x32 images"),
    ],
)
def test_missing_data(refused, nothing_written, argv, message):
    assert message in refused("-a", "resnet20_1w1a", *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data_path", "none"], "none: --data_path is not a folder"),
        (["--data_path", "file"], "file: --data_path is not a folder"),
        (["--data_path", "."], "no folder test or val in /"),
        ([], "imagenet/dataset/README.md"),
        (["--dataset", "tinyimagenet"], "no Tiny ImageNet in"),
        (["--dataset", "tinyimagenet", "--data_path", "."], "no Tiny ImageNet in /"),
        (["--dataset", "folder"], "--dataset folder needs --data_path FOLDER"),
        (["-a", "resnet20_1w1a"], "choose from mobilenet, mobilenet_react, resnet18"),
        (["--dataset", "cifar10", "--image_size", "64"], "--image_size is not for cifar10"),
        (["--checkpoint_minutes", "-1"], "--checkpoint_minutes -1.0 is too small"),
        (["--image_size", "4"], "--image_size 4 is too small"),
    ],
)
def test_imagenet_flags(refused, tmp_path, monkeypatch, argv, message):
    monkeypatch.setattr("biper.data.datasets.REPOSITORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    assert message in refused(*argv, family="imagenet")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_streamed_folders_that_are_unfit(refused, tmp_path):
    data, run = photographs(tmp_path / "data", train=3, test=2), tmp_path / "run"
    flags = ["--dataset", "folder", "--data_path", data, "--image_size", 32, "--workers", 0, "--results_dir", run]
    (data / "train" / "empty").mkdir()
    assert "hold other classes: empty only in one of them" in refused(*flags, family="imagenet")
    (data / "val" / "empty").mkdir()
    assert f"no images in {data / 'val' / 'empty'}" in refused(*flags, family="imagenet")
    shutil.rmtree(data / "val" / "empty")
    shutil.rmtree(data / "train" / "empty")
    for file in list((data / "train").glob("*/*"))[1:]:
        file.unlink()
    err = refused(*flags, family="imagenet")
    assert "no images in" in err
    assert not run.exists()


def test_dali_that_is_not_installed(refused, tmp_path, monkeypatch):
    data = photographs(tmp_path / "data", train=3, test=2)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # as import finds it where it is missing
    flags = ["--dataset", "folder", "--data_path", data, "--results_dir", tmp_path / "run", "--use_dali"]
    assert "--use_dali needs DALI: pip install -e '.[dali]'" in refused(*flags, family="imagenet")
    assert not (tmp_path / "run").exists()


def test_stage_2_needs_stage_1(refused, nothing_written, trained):
    assert "give --load_ckpt_stage1" in refused(*TINY, stage=2)
    assert "/here/x" in refused(*TINY, "--load_ckpt_stage1", "x", stage=2)
    two = trained / "stage2" / BEST
    assert "is a checkpoint of stage 2" in refused("--load_ckpt_stage1", two, stage=2)


def test_stage_2_that_contradicts_stage_1(refused, nothing_written, trained):
    start = ["--load_ckpt_stage1", trained / "stage1" / BEST]
    assert "freq 30.0 contradicts" in refused(*start, "--freq", "30", stage=2)
    assert "model resnet18_1w1a contradicts" in refused(*start, "-a", "resnet18_1w1a", stage=2)


def test_stage_2_on_other_classes(refused, nothing_written, trained, image_folder):
    flags = ["--load_ckpt_stage1", trained / "stage1" / BEST, "--dataset", "folder", "--data_path", image_folder]
    assert "the checkpoint has 10 classes 0, 1, 2..., the data have 2 classes dark, light..." in refused(
        *flags, "--image_size", "8", stage=2
    )


def test_stage_2_of_a_full_precision_network(refused, command, tmp_path):
    assert command(*TINY, "-a", "resnet20_32w32a", "--epochs", 1, "--results_dir", tmp_path)[0] == 0
    assert "no weights to binarize" in refused("--load_ckpt_stage1", tmp_path / BEST, stage=2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--freq", "30"], "freq 30.0 contradicts"),
        (["-a", "resnet18_1w1a"], "model resnet18_1w1a contradicts"),
        (["--dataset", "cifar10"], "--dataset cifar10 contradicts"),
        (["--image_size", "16"], "--image_size 16 contradicts"),
        (["--gpus", "7"], "GPU 7 is not there"),
    ],
)
def test_evaluation_that_contradicts_its_checkpoint(refused, nothing_written, trained, argv, message):
    assert message in refused("-e", trained / "stage1" / BEST, *argv)


def test_damaged_checkpoints(refused, nothing_written, trained, tmp_path):
    path = tmp_path / "cut.pth.tar"
    path.write_bytes((trained / "stage1" / BEST).read_bytes()[:-1000])
    for argv, stage in ((["-e", path], 1), (["--load_ckpt_stage1", path], 2)):
        assert "is damaged or no checkpoint" in refused(*argv, stage=stage)
    torch.save({"weights": 1}, path)
    assert "has no state_dict" in refused("-e", path)


def test_a_folder_that_holds_another_run(refused, trained):
    folder = trained / "stage1"
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert "holds another run" in refused(*TINY, "--epochs", 1, "--results_dir", folder)
    assert "but lr: 0.9 (there 0.05)" in refused("--results_dir", folder, "--resume", "--lr", "0.9")
    assert "holds no run of stage 2" in refused("--results_dir", folder, "--resume", stage=2)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_best_checkpoint_alone_is_not_resumed_over(refused, trained, tmp_path):
    shutil.copy(trained / "stage1" / BEST, tmp_path / BEST)
    before = (tmp_path / BEST).read_bytes()
    assert "to go on from" in refused(*TINY, "--results_dir", tmp_path, "--resume")
    assert (tmp_path / BEST).read_bytes() == before


def test_a_setting_of_the_future(refused, trained, tmp_path):
    contents = read_checkpoint(trained / "stage1" / BEST)
    contents["settings"]["warp"] = 9
    torch.save(contents, tmp_path / "c.pth.tar")
    assert "'warp' that this biper does not know" in refused("-e", tmp_path / "c.pth.tar")


def test_images_that_are_not_square_or_too_few(refused, nothing_written, image_folder):
    flags = ["-a", "resnet20_1w1a", "--dataset", "folder", "--data_path", image_folder]
    assert "12x10, not square: give --image_size" in refused(*flags)
    for name in ("dark", "light"):
        for file in sorted((image_folder / "train" / name).iterdir())[1 if name == "dark" else 0 :]:
            file.unlink()
    shutil.rmtree(image_folder / "train" / "light")
    shutil.rmtree(image_folder / "test" / "light")
    assert "too few training images" in refused(*flags, "--image_size", "8")


def test_a_path_that_the_system_refuses(refused, nothing_written):
    assert "File name too long" in refused(*TINY, "--results_dir", "x" * 300)


def test_out_of_memory_is_one_line(refused, nothing_written, monkeypatch):
    def too_large(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes.")

    monkeypatch.setattr("biper.training.build.build_loaders", too_large)
    assert "give a smaller -b" in refused(*TINY)


def test_resume_of_a_damaged_checkpoint(refused, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained / "stage1", folder)
    (folder / LATEST).write_bytes(b"damaged")
    assert "is damaged or no checkpoint" in refused("--results_dir", folder, "--resume")
    assert (folder / LATEST).read_bytes() == b"damaged"


def test_results_folders_that_cannot_be_written(refused, tmp_path):
    locked, file = tmp_path / "locked", tmp_path / "file"
    locked.mkdir()
    locked.chmod(0o555)
    file.write_text("x")
    assert "is read-only" in refused(*TINY, "--results_dir", locked)
    assert "is read-only" in refused(*TINY, "--results_dir", locked, "--save", "below")
    assert "is a file" in refused(*TINY, "--results_dir", file / "run")
    assert list(locked.iterdir()) == []


def test_an_unreadable_image_is_named(refused, nothing_written, image_folder):
    victim = image_folder / "test" / "light" / "1.jpg"
    victim.write_bytes(b"no image")
    flags = ["-a", "resnet20_1w1a", "--dataset", "folder", "--data_path", image_folder]
    assert str(victim) in refused(*flags)


def test_the_general_entry_only_evaluates(refused):
    assert "required: FILE (see eval.sh --help)" in refused(family=None)


def test_errors_of_the_parser_are_one_line():
    with pytest.raises(ValueError, match=r"\(see main.py --help\)$"):
        Parser(prog="main.py").parse_args(["--x"])
