"""Whole short runs in this process, on 8x8 digits."""

import csv
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import biper
from biper.models.checkpoint import read_checkpoint
from biper.packed.file import save_packed
from biper.packed.pack import pack
from biper.training import trainer as trainer_module
from biper.training.build import build_trainer
from biper.training.checkpoint import BEST, LATEST, publish_best
from biper.training.distributed import Processes
from biper.training.loop import Metrics
from biper.training.loss import LossTerm
from biper.training.schedule import lr_at
from biper.training.settings import SETTINGS, make_settings


def rows(folder):
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def same_weights(a, b):
    one, two = (read_checkpoint(p)["state_dict"] for p in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_run_leaves_what_the_first_training_lists(trained):
    folder = trained / "stage1"
    assert {p.name for p in folder.iterdir()} == {
        LATEST,
        BEST,
        "logger.log",
        "metrics.csv",
        "config.yaml",
        "tensorboard",
    }
    assert [row["epoch"] for row in rows(folder)] == ["1", "2", "3"]
    assert [float(row["lr"]) for row in rows(folder)] == pytest.approx([0.01, 0.02, 0.03])
    settings = yaml.safe_load((folder / "config.yaml").read_text())["stage1"]
    assert (settings["lr"], settings["model"], settings["seed"]) == (0.05, "resnet20_1w1a", 0)
    assert list(settings) == [name for name in SETTINGS if name in settings]  # in the order of the help
    events = EventAccumulator(str(folder / "tensorboard"), {"histograms": 0})
    events.Reload()
    assert {"lr", "tau", "qe", "train/loss", "train/top5", "test/top1", "seconds"} <= set(events.Tags()["scalars"])
    assert len(events.Tags()["histograms"]) == 18
    logged = [round(e.value, 3) for e in events.Scalars("test/top1")]
    assert logged == [round(float(row["test_top1"]), 3) for row in rows(folder)]
    log = (folder / "logger.log").read_text()
    best = max(float(row["test_top1"]) for row in rows(folder))
    assert f"best top-1 {best:.2f} %" in log
    assert ("no CUDA GPU was found" in log) != torch.cuda.is_available()


def test_stage_2_is_a_warm_start_and_trains_every_epoch(trained, tmp_path, command):
    start = trained / "stage1" / BEST
    assert len(rows(trained / "stage2")) == 2
    code, _, err = command(
        *["--load_ckpt_stage1", start, "--epochs", 1, "--lr", 1e-30, "--no-regularizer", "--weight_decay", 0],
        *["-b", 256, "--results_dir", tmp_path],
        stage=2,
    )
    assert code == 0, err
    one, two = biper.load_checkpoint(start), biper.load_checkpoint(tmp_path / BEST)
    assert torch.equal(one.layer2[0].conv1.weight, two.layer2[0].conv1.weight)
    binary = two.layer2[0].conv1.effective_weight()
    assert torch.equal(binary, torch.where(one.layer2[0].conv1.effective_weight() >= 0, 1.0, -1.0))
    assert (two.metadata.stage, two.metadata.freq, two.metadata.dataset) == (2, 20, "digits")


def test_evaluation_gives_the_training_logs_number_and_writes_nothing(trained, command):
    folder = trained / "stage2"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    best = max(rows(folder), key=lambda row: float(row["test_top1"]))
    code, out, _ = command("-e", folder / BEST, family=None, stage=None)
    assert code == 0
    assert f"top-1 {float(best['test_top1']):.2f} %  top-5 {float(best['test_top5']):.2f} %" in out
    assert f"loss {float(best['test_loss']):.4f}  (360 images)" in out
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def short_run(folder, *more):
    return [*TINY, "--epochs", 3, "--seed", 5, "--results_dir", folder, *more]


def test_resume_ends_bit_for_bit_where_an_uninterrupted_run_ends(tmp_path, command, monkeypatch):
    assert command(*short_run(tmp_path / "whole"))[0] == 0
    save = trainer_module.save_checkpoint

    def stopping(contents, path):
        save(contents, path)
        if contents["epoch"] == 2:  # before the best checkpoint and metrics.csv are written
            raise KeyboardInterrupt("SIGINT")

    monkeypatch.setattr(trainer_module, "save_checkpoint", stopping)
    code, _, err = command(*short_run(tmp_path / "cut"))
    assert code == 130
    assert "--resume" in err
    assert len(rows(tmp_path / "cut")) == 1
    monkeypatch.undo()
    code, out, err = command("--results_dir", tmp_path / "cut", "--resume")  # the folder knows the rest
    assert code == 0, err
    assert "going on after 2 of 3 epochs" in out
    for name in (LATEST, BEST):
        assert same_weights(tmp_path / "whole" / name, tmp_path / "cut" / name)
    assert (tmp_path / "whole" / "metrics.csv").read_text() == (tmp_path / "cut" / "metrics.csv").read_text()
    states = [read_checkpoint(tmp_path / f / LATEST)["random_state"]["torch"] for f in ("whole", "cut")]
    assert torch.equal(*states)
    code, out, _ = command("--results_dir", tmp_path / "cut", "--resume")  # a finished run stays as it is
    assert code == 0
    assert "--resume: all 3 epochs are done" in out
    assert same_weights(tmp_path / "whole" / LATEST, tmp_path / "cut" / LATEST)


STEPS = ["--lr_type", "step", "--lr_decay_step", 1, 4]


def test_a_run_that_is_extended_ends_where_one_of_so_many_epochs_ends(tmp_path, command, refused):
    flags = [*TINY, *STEPS, "--results_dir"]
    assert command(*flags, tmp_path / "whole", "--epochs", 5)[0] == 0
    begun = [*flags, tmp_path / "more", "--epochs", 2]
    assert command(*begun)[0] == 0
    for more in (1, 1, 3, 3):  # the same command again finds nothing to do
        code, out, err = command(*begun, "--resume", "--extend", more)
        assert code == 0, err
    assert "--resume: all 5 epochs are done" in out
    assert "extended by 3 epochs already" in refused(*begun, "--resume", "--extend", 2)
    assert command("--results_dir", tmp_path / "more", "--resume")[0] == 0  # the folder knows the rest
    for name in (LATEST, BEST):
        one, other = (read_checkpoint(tmp_path / run / name) for run in ("whole", "more"))
        assert one["history"] == other["history"]
        assert all(torch.equal(other["state_dict"][key], tensor) for key, tensor in one["state_dict"].items())
    configs = [(tmp_path / run / "config.yaml").read_text() for run in ("whole", "more")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the learning rate of --lr_type cos follows from the last epoch, 1, where it ends"),
        ([*STEPS, "--tau_min", 0.01, "--tau_max", 0.02], "tau follows from the last epoch, 1"),
        ([*STEPS, "--input_quantizer", "irnet"], "the quantizers change until the last epoch"),
    ],
)
def test_a_schedule_that_has_ended_is_not_extended(tmp_path, command, refused, flags, message):
    argv = [*TINY, *flags, "--epochs", 1, "--results_dir", tmp_path]
    assert "give --resume" in refused(*argv, "--extend", 2)
    assert command(*argv)[0] == 0
    before = (tmp_path / LATEST).read_bytes()
    text = refused("--results_dir", tmp_path, "--resume", "--extend", 2)
    assert message in text
    assert "start one with --epochs" in text
    assert (tmp_path / LATEST).read_bytes() == before


def test_stage_2_resumes_without_stage_1(trained, tmp_path, command):
    start = tmp_path / "start.pth.tar"
    shutil.copy(trained / "stage1" / BEST, start)
    flags = ["--load_ckpt_stage1", start, "--epochs", 2, "-b", 256, "--results_dir", tmp_path / "run"]
    assert command(*flags, stage=2)[0] == 0
    start.unlink()
    assert command(*flags, "--resume", stage=2)[0] == 0
    assert command("--results_dir", tmp_path / "run", "--resume", stage=2)[0] == 0


def test_resume_with_nothing_saved_starts_fresh(tmp_path, command):
    code, out, _ = command(*TINY, "--epochs", 1, "--results_dir", tmp_path, "--resume")
    assert code == 0
    assert "nothing saved yet, starting fresh" in out


def test_seeds(trained, tmp_path, command):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert command(*TINY, "--epochs", 1, "--seed", seed, "--results_dir", tmp_path / name)[0] == 0
        weights.append(tmp_path / name / LATEST)
    assert same_weights(weights[0], weights[1])
    assert not same_weights(weights[0], weights[2])


def test_other_settings_of_the_paper(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default results_dir is below it
    code, out, err = command(
        *[*TINY, "--epochs", 2, "--type", "torch.FloatTensor", "--optimizer", "adam", "--lr", 1e-3, "--use_dali"],
        *["--lr_type", "step", "--lr_decay_step", 1, "--print_freq", 2, "--time_estimate", 0, "--start_epoch", 1],
        "--deterministic",
    )
    assert code == 0, err
    folder = Path("results/digits_resnet20_1w1a_stage1")
    assert [(row["epoch"], float(row["lr"])) for row in rows(folder)] == [("2", pytest.approx(1e-4))]
    assert "epoch 2/2 step 2/6" in out
    assert "epoch 2/2 step 4/6" in out
    assert "finish" not in out
    assert "--use_dali has no effect" in out


def test_a_run_in_which_no_epoch_improves(tmp_path, command, monkeypatch):
    monkeypatch.setattr(trainer_module, "evaluate", lambda *_: Metrics({"loss": 1.0}, 10.0, 50.0, 360))
    code, out, err = command(*TINY, "--epochs", 2, "--results_dir", tmp_path)
    assert code == 0, err
    assert "(epoch 1)" in out
    assert read_checkpoint(tmp_path / BEST)["epoch"] == 1
    assert read_checkpoint(tmp_path / LATEST)["epoch"] == 2


def test_divergence_keeps_the_last_good_checkpoint(tmp_path, command, monkeypatch):
    run = trainer_module.train_one_epoch

    def poisoned(step, loader, *, epoch, **options):
        if epoch == 1:
            step.model.network.linear.weight.data[:] = np.nan
        return run(step, loader, epoch=epoch, **options)

    monkeypatch.setattr(trainer_module, "train_one_epoch", poisoned)
    code, _, err = command(*TINY, "--epochs", 3, "--results_dir", tmp_path)
    assert code == 1
    assert err.startswith("error: the loss is nan in epoch 2, step 1; the last good checkpoint, of epoch 1, is")
    assert read_checkpoint(tmp_path / LATEST)["epoch"] == 1
    assert "stopped by TrainingDiverged" in (tmp_path / "logger.log").read_text()


def test_a_full_disk_in_mid_run(tmp_path, refused, command, monkeypatch, small_disk):
    with ExitStack() as disk:

        def then_full(folder):
            publish_best(folder)
            disk.enter_context(small_disk(200_000))

        monkeypatch.setattr("biper.training.train.publish_best", then_full)
        err = refused(*TINY, "--epochs", 2, "--results_dir", tmp_path)
    assert f"cannot write to {tmp_path}: [Errno 27] File too large: '{tmp_path / LATEST}'" in err
    assert "what was saved before is intact: then go on with --resume" in err
    assert read_checkpoint(tmp_path / LATEST)["epoch"] == 1
    monkeypatch.undo()
    assert command("--results_dir", tmp_path, "--resume")[0] == 0


def test_a_folder_that_vanishes_in_mid_run(tmp_path, refused, monkeypatch):
    monkeypatch.setattr("biper.training.train.publish_best", shutil.rmtree)
    err = refused(*TINY, "--epochs", 2, "--results_dir", tmp_path / "run")
    assert "there is no folder" in err
    assert "it holds no checkpoint: then start again" in err


def test_a_term_that_is_added_to_a_trainer_is_a_column_of_its_own(tmp_path):
    given = {"dataset": "digits", "image_size": 8, "model": "resnet20_1w1a", "results_dir": str(tmp_path)}
    trainer = build_trainer(make_settings("cifar10", 1, given | {"epochs": 1}), Processes())

    def norm(model, images, logits, labels):
        return sum(p.square().sum() for p in model.parameters())

    make_terms = trainer.make_terms
    trainer.make_terms = lambda tau: {**make_terms(tau), "norm": LossTerm(norm, of_images=False)}
    trainer.run_epoch()
    (row,) = trainer.history
    columns = [name for name in row if name.startswith("train_")]
    assert columns == [f"train_{name}" for name in ("loss", "regularizer", "norm", "top1", "top5", "replaced")]
    assert row["train_norm"] > 0


def test_the_learning_rate_of_a_cycle_changes_from_step_to_step(tmp_path):
    given = {"dataset": "digits", "image_size": 8, "model": "resnet20_1w1a", "results_dir": str(tmp_path)}
    settings = make_settings("cifar10", 1, given | {"epochs": 2, "lr": 0.1, "lr_type": "onecycle", "lr_peak": 0.25})
    trainer = build_trainer(settings, Processes())
    used = []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    trainer.run_epoch()
    shape = {"lr": 0.1, "epochs": 2, "lr_type": "onecycle", "lr_decay_step": settings.lr_decay_step, "lr_peak": 0.25}
    shape |= {"warm_up": settings.warm_up, "warm_up_epochs": settings.warm_up_epochs}
    assert used == pytest.approx([lr_at(step / len(used), **shape) for step in range(len(used))])
    assert len(set(used)) == len(used) > 1


def test_the_checkpoint_knows_the_seconds_that_the_log_shows(tmp_path, command):
    for epochs in (1, 2):
        flags = ["--start_epoch", 1] if epochs == 1 else []
        assert command(*TINY, "--epochs", 2, *flags, "--results_dir", tmp_path / str(epochs))[0] == 0
        seconds = read_checkpoint(tmp_path / str(epochs) / LATEST)["seconds"]
        log = (tmp_path / str(epochs) / "logger.log").read_text()
        assert len(seconds) == epochs
        assert all(f"  {value:.1f} s  finish" in log for value in seconds)


def test_a_folder_of_images(image_folder, tmp_path, command):
    flags = ["--dataset", "folder", "--data_path", image_folder, "--image_size", 8, "-b", 4, "-a", "resnet20_1w1a"]
    code, out, err = command(*flags, "--epochs", 1, "--results_dir", tmp_path / "run")
    assert code == 0, err
    assert "16 training and 8 test images of 8x8, 2 classes" in out
    model = biper.load_checkpoint(tmp_path / "run" / BEST)
    assert model.metadata.classes == ("dark", "light")
    assert command("-e", tmp_path / "run" / BEST)[0] == 0


def test_full_precision_twin(tmp_path, command):
    flags = [*TINY, "-a", "resnet20_32w32a", "--epochs", 1]
    assert command(*flags, "--results_dir", tmp_path)[0] == 0
    assert float(rows(tmp_path)[0]["qe"]) == 0


def test_a_network_of_a_folder_is_evaluated_on_a_named_copy_of_its_data(trained, command, refused, tmp_path):
    """A folder may hold another copy of a data set that has a name, such as CIFAR-10."""
    contents = read_checkpoint(trained / "stage2" / BEST)
    contents["metadata"] |= {"dataset": "folder"}
    contents["settings"] |= {"dataset": "folder", "data_path": "/nowhere"}
    path, packed = tmp_path / "folder.pth.tar", tmp_path / "folder.safetensors"
    torch.save(contents, path)
    save_packed(pack(biper.load_checkpoint(path)), packed)
    named = ["--dataset", "digits", "--image_size", 8]
    for file in (path, packed):
        code, out, err = command("-e", file, *named, family=None, stage=None)
        assert code == 0, err
        assert f"top-1 {contents['history'][-1]['test_top1']:.2f} %" in out
        assert "no data at" in refused("-e", path, family=None, stage=None)
