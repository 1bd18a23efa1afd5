"""Checkpoints within an epoch, and going on from there."""

import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, photographs

from biper.errors import TrainingDiverged
from biper.models.checkpoint import read_checkpoint
from biper.training import trainer as trainer_module
from biper.training.build import build_trainer
from biper.training.checkpoint import BEST, LATEST
from biper.training.distributed import Processes
from biper.training.settings import make_settings

EVERY_STEP = ["--checkpoint_minutes", 1e-9]


def equal(a, b):
    for name in (LATEST, BEST):
        one, two = read_checkpoint(a / name), read_checkpoint(b / name)
        assert all(torch.equal(one["state_dict"][key], value) for key, value in two["state_dict"].items())
        assert one["history"] == two["history"]
        assert torch.equal(one["random_state"]["torch"], two["random_state"]["torch"])
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()


@pytest.mark.parametrize("loader", ["memory", "pillow", "workers", "dali"])
def test_a_run_goes_on_within_its_epoch_without_repeating_images(tmp_path, command, monkeypatch, loader):
    flags = [*TINY, "-b", 128, "--epochs", 2]
    family = "cifar10" if loader == "memory" else "imagenet"
    workers = 2 if loader == "workers" else 0
    if loader != "memory":
        if loader == "dali":
            pytest.importorskip("nvidia.dali")
        data = photographs(tmp_path / "data", train=16, test=2)
        flags = ["--dataset", "folder", "--data_path", data, "--image_size", 32, "-b", 8, "--epochs", 2, "--freq", 20]
        flags += ["--workers", workers, "--lr", 0.01, *(["--use_dali"] if loader == "dali" else [])]
    code, _, err = command(*flags, "--checkpoint_minutes", 0, "--results_dir", tmp_path / "whole", family=family)
    assert code == 0, err
    save, seen = trainer_module.save_checkpoint, []

    def stopping(contents, path):
        save(contents, path)
        seen.append((contents["epoch"], contents["step"]))
        if seen[-1] in ((0, 3), (1, 2)):
            raise KeyboardInterrupt("SIGINT")

    monkeypatch.setattr(trainer_module, "save_checkpoint", stopping)
    for steps in ("epochs and 3 steps", "epochs and 2 steps", None):
        code, out, _ = command(*flags, *EVERY_STEP, "--results_dir", tmp_path / "cut", "--resume", family=family)
        assert code == (130 if steps else 0)
        if seen[0] == (0, 1) and len(seen) > 3:
            assert "going on after" in out
    assert len(seen) == len(set(seen))  # no step was done twice
    assert [step for epoch, step in seen if epoch == 0] == list(range(1, max(s for e, s in seen if e == 0) + 1))
    equal(tmp_path / "whole", tmp_path / "cut")


def test_a_checkpoint_within_the_first_epoch_is_whole(tmp_path, command, monkeypatch):
    save = trainer_module.save_checkpoint

    def stopping(contents, path):
        save(contents, path)
        raise KeyboardInterrupt("SIGTERM")

    monkeypatch.setattr(trainer_module, "save_checkpoint", stopping)
    assert command(*TINY, "--epochs", 1, *EVERY_STEP, "--results_dir", tmp_path)[0] == 128 + signal.SIGTERM
    contents = read_checkpoint(tmp_path / LATEST)
    assert (contents["epoch"], contents["step"], contents["best_prec1"], contents["history"]) == (0, 1, 0.0, [])
    assert not (tmp_path / BEST).exists()
    assert command("-e", tmp_path / LATEST)[0] == 0  # it evaluates like any other


def test_kill_9_within_an_epoch(tmp_path):
    flags = [
        str(a) for a in (sys.executable, "-u", ROOT / "cifar10" / "main.py", *TINY, "--epochs", 1, "-b", 64, "-p", 1)
    ]
    whole = subprocess.run([*flags, "--results_dir", tmp_path / "whole"], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    cut = [*flags, "--checkpoint_minutes", "1e-9", "--results_dir", tmp_path / "cut", "--resume"]
    with subprocess.Popen(cut, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert any("step 12/23" in line for line in iter(process.stdout.readline, ""))
        process.kill()
    assert process.returncode == -signal.SIGKILL
    last = subprocess.run(cut, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert "going on after 0 of 1 epochs and 1" in last.stdout
    equal(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(("minutes", "due"), [(20, False), (30.1, True)])  # an epoch may take its time
def test_a_checkpoint_within_an_epoch_is_due_by_the_clock(tmp_path, monkeypatch, minutes, due):
    given = {"dataset": "digits", "image_size": 8, "model": "resnet20_1w1a", "batch_size": 720}
    settings = make_settings("cifar10", 1, given | {"results_dir": str(tmp_path), "checkpoint_minutes": 30.0})
    trainer, saved = build_trainer(settings, Processes()), []
    monkeypatch.setattr(trainer_module, "save_checkpoint", lambda contents, path: saved.append(contents["step"]))
    trainer.saved_at -= 60 * minutes
    trainer.run_epoch()
    assert saved == ([1] if due else [])


def test_a_checkpoint_within_an_epoch_of_an_earlier_version_is_taken_up(tmp_path, command, monkeypatch):
    """It had the sums of four names as a list, and no seconds."""
    flags = [*TINY, "--epochs", 2]
    assert command(*flags, "--results_dir", tmp_path / "whole")[0] == 0
    save = trainer_module.save_checkpoint

    def stopping(contents, path):
        save(contents, path)
        if (contents["epoch"], contents["step"]) == (1, 3):
            raise KeyboardInterrupt("SIGINT")

    monkeypatch.setattr(trainer_module, "save_checkpoint", stopping)
    assert command(*flags, *EVERY_STEP, "--results_dir", tmp_path / "cut")[0] == 130
    monkeypatch.undo()
    contents = read_checkpoint(tmp_path / "cut" / LATEST)
    sums = contents["partial"]["sums"]
    assert list(sums) == ["loss", "regularizer", "top1", "top5"]
    contents["partial"] = {"sums": list(sums.values()), "count": contents["partial"]["count"], "replaced": 0}
    del contents["seconds"]
    torch.save(contents, tmp_path / "cut" / LATEST)
    assert command(*flags, "--results_dir", tmp_path / "cut", "--resume")[0] == 0
    equal(tmp_path / "whole", tmp_path / "cut")
    first, second = read_checkpoint(tmp_path / "cut" / LATEST)["seconds"]
    assert first is None
    assert second > 0


def test_an_interrupted_epoch_counts_its_damaged_images_once(tmp_path, command, monkeypatch):
    data = photographs(tmp_path / "data", train=16, test=2)
    sorted((data / "train").glob("*/*"))[0].write_bytes(b"no image")
    flags = ["--dataset", "folder", "--data_path", data, "--image_size", 32, "-b", 8, "--epochs", 2, "--freq", 20]
    flags += ["--workers", 0, "--lr", 0.01, "--resume", "--results_dir", tmp_path / "run"]
    save = trainer_module.save_checkpoint

    def stopping(contents, path):
        save(contents, path)
        if contents["step"] == 4:
            raise KeyboardInterrupt("SIGINT")

    monkeypatch.setattr(trainer_module, "save_checkpoint", stopping)
    for _ in range(2):
        assert command(*flags, *EVERY_STEP, family="imagenet")[0] == 130
    assert command(*flags, *EVERY_STEP, family="imagenet")[0] == 0
    assert [row["train_replaced"] for row in read_checkpoint(tmp_path / "run" / LATEST)["history"]] == [1, 1]


def test_divergence_after_a_checkpoint_within_the_epoch(tmp_path, command, monkeypatch):
    def poisoned(step, loader, *, totals, after_step, **_):
        after_step(1, totals)
        raise TrainingDiverged("the loss is nan in epoch 1, step 2")

    monkeypatch.setattr(trainer_module, "train_one_epoch", poisoned)
    code, _, err = command(*TINY, "--epochs", 1, *EVERY_STEP, "--results_dir", tmp_path)
    assert code == 1
    assert f"the last good checkpoint, of step 1 of epoch 1, is {tmp_path / LATEST}" in err


def test_weights_that_are_not_finite_do_not_replace_a_good_checkpoint(tmp_path, command, monkeypatch):
    """VGG's signs hide a NaN from the loss; a checkpoint within the epoch must not keep it."""
    run, steps = trainer_module.train_one_epoch, []

    def poisoned(trained, loader, *, after_step, **options):
        def after(step, totals):
            steps.append(step)
            if step == 3:
                trained.model.network.bn1.running_mean[0] = float("nan")
            after_step(step, totals)

        return run(trained, loader, after_step=after, **options)

    monkeypatch.setattr(trainer_module, "train_one_epoch", poisoned)
    code, _, err = command(*TINY, "--epochs", 1, *EVERY_STEP, "--results_dir", tmp_path)
    assert code == 1
    assert "bn1.running_mean is no longer finite after step 3 of epoch 1" in err
    assert f"of step 2 of epoch 1, is {tmp_path / LATEST}" in err
    contents = read_checkpoint(tmp_path / LATEST)
    assert contents["step"] == 2
    assert all(t.isfinite().all() for t in contents["state_dict"].values() if t.is_floating_point())
