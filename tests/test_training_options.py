"""What a training may do beside what is published: a validation split, a teacher, mixed images, smoothed labels."""

import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, photographs
from recipes import write_recipe

from biper.commands.ablation import main as ablation_main
from biper.commands.reproduce import main as reproduce_main
from biper.data import digits
from biper.data.validation import hold_out
from biper.errors import UsageError
from biper.models.checkpoint import read_checkpoint
from biper.training import trainer as trainers
from biper.training.checkpoint import BEST, LATEST, save_checkpoint
from biper.training.distillation import require_unseen, soft_divergence
from biper.training.loss import LossTerm, make_loss_terms
from biper.training.mixup import MixUp

FULL = ["--dataset", "digits", "--image_size", 8, "-a", "resnet20_32w32a", "-b", 256, "--lr", 0.1]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The checkpoint of a full-precision network."""
    from biper.commands.train import main

    folder = tmp_path_factory.mktemp("teacher")
    main("cifar10", 1, [str(a) for a in (*FULL, "--epochs", 2, "--results_dir", folder)])
    return folder / BEST


def test_a_validation_split_takes_each_class_its_share():
    split = digits.read_digits(True, 8)
    held, stay = hold_out(split, 300, 0)
    assert (len(held.labels), len(stay.labels)) == (300, 1137)
    assert (held.labels.bincount() - 300 * split.labels.bincount() / 1437).abs().max() < 1
    parts = [set(map(bytes, part.pixels.flatten(1).numpy())) for part in (held, stay, split)]
    assert parts[0] | parts[1] == parts[2]
    assert not parts[0] & parts[1]
    assert torch.equal(hold_out(split, 300, 0)[0].labels, held.labels)
    assert not torch.equal(hold_out(split, 300, 1)[0].pixels, held.pixels)


def test_with_a_validation_split_the_test_images_are_not_read(command, monkeypatch, tmp_path):
    def read(train, size):
        assert train
        return original(train, size)

    original = digits.read_digits
    monkeypatch.setattr(digits, "read_digits", read)
    code, out, err = command(*TINY, "--epochs", 1, "--validation", 200, "--seed", 3, "--results_dir", tmp_path)
    assert code == 0, err
    assert "1,237 training and 200 held-out training images" in out
    assert "  validation loss " in out
    assert "% of the held-out images" in out
    top1 = re.search(r"best top-1 (\S+ %)", out)[1]
    code, out, _ = command("-e", tmp_path / BEST, "--validation", 200, family=None)
    assert "(200 images)" in out
    assert f"top-1 {top1}" in out
    monkeypatch.undo()
    code, out, _ = command("-e", tmp_path / BEST, family=None)
    assert "(360 images)" in out  # a finished network sees them


def test_streamed_images_are_held_out_too(command, tmp_path):
    data = photographs(tmp_path / "data", train=8, test=2)
    flags = ["--dataset", "folder", "--data_path", data, "--image_size", 32, "-b", 4, "--workers", 0, "--epochs", 1]
    code, out, err = command(*flags, "--validation", 4, "--results_dir", tmp_path / "run", family="imagenet")
    assert code == 0, err
    assert "12 training and 4 held-out training images" in out


def test_stage_2_holds_out_what_stage_1_did(command, refused, tmp_path):
    one = [*TINY, "--epochs", 1, "--validation", 200, "--seed", 3]
    assert command(*one, "--results_dir", tmp_path / "one")[0] == 0
    assert command(*TINY, "--epochs", 1, "--results_dir", tmp_path / "all")[0] == 0
    two = ["--epochs", 1, "-b", 256, "--results_dir", tmp_path / "two", "--load_ckpt_stage1"]
    err = refused(*two, tmp_path / "one" / BEST, "--seed", 1, stage=2)
    assert "200 images by seed 3 held out" in err
    assert err.endswith(": give --validation 200 --seed 3\n")
    assert "with none held out" in refused(*two, tmp_path / "all" / BEST, "--validation", 200, stage=2)
    assert command(*two, tmp_path / "one" / BEST, stage=2)[0] == 0
    settings = read_checkpoint(tmp_path / "two" / LATEST)["settings"]
    assert (settings["validation"], settings["seed"]) == (200, 3)


def test_experiments_say_what_they_measure_on(command, refused, tmp_path):
    recipe = write_recipe(tmp_path)
    assert "what is released saw all images" in refused(recipe, "--validation", 200, entry=reproduce_main)
    flags = ["--epochs", 1, 1, "--studies", "warm_start", "--validation", 200, "--results_dir", tmp_path / "out"]
    assert command(recipe, *flags, entry=ablation_main)[0] == 0
    assert "Measured on 200 training images" in (tmp_path / "out" / "warm_start.md").read_text()


OPTIONS = {
    "schedule": ["--lr_type", "onecycle", "--lr_peak", 0.4, "--nesterov", "--lr_alpha", 0.5, "--lr_norm_bias", 2],
    "images": [
        "--mixup",
        0.3,
        "--cutout",
        3,
        "--padding",
        "reflect",
        "--label_smoothing",
        0.1,
        "--flip",
        "alternating",
    ],
    "adamw": ["--optimizer", "adamw", "--lr", 0.003, "--lr_type", "triangular", "--validation", 137, "--ema", 0.9],
}


def resumed_exactly(flags, command, monkeypatch, folder):
    """Train, whole and with an interruption within an epoch; the history, which both have."""
    assert command(*flags, "--results_dir", folder / "whole")[0] == 0
    save = trainers.save_checkpoint

    def stopping(contents, path):
        save(contents, path)
        if (contents["epoch"], contents["step"]) == (1, 2):
            raise KeyboardInterrupt("SIGINT")

    monkeypatch.setattr(trainers, "save_checkpoint", stopping)
    assert command(*flags, "--checkpoint_minutes", 1e-9, "--results_dir", folder / "cut")[0] == 130
    monkeypatch.undo()
    assert command("--results_dir", folder / "cut", "--resume")[0] == 0
    whole, cut = (read_checkpoint(folder / name / LATEST) for name in ("whole", "cut"))
    assert whole["history"] == cut["history"]
    assert all(torch.equal(cut["state_dict"][name], tensor) for name, tensor in whole["state_dict"].items())
    assert torch.equal(cut["random_state"]["torch"], whole["random_state"]["torch"])
    return whole["history"]


@pytest.mark.parametrize("name", OPTIONS)
def test_options_learn_and_resume_exactly(name, command, monkeypatch, tmp_path):
    history = resumed_exactly([*TINY, *OPTIONS[name], "--epochs", 3], command, monkeypatch, tmp_path)
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_a_teacher_is_learned_from_and_a_run_with_one_resumes_exactly(teacher, command, monkeypatch, tmp_path):
    flags = [*TINY, "--epochs", 3, "--teacher", teacher, "--teacher_weight", 0.9, "--temperature", 2]
    history = resumed_exactly(flags, command, monkeypatch, tmp_path)
    assert history[-1]["train_distillation"] < history[0]["train_distillation"]


def test_the_teachers_term_is_hintons():
    own, wanted = (torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    own.requires_grad_()
    value = soft_divergence(own, wanted, 3.0)
    p, q = (torch.exp(x / 3) / torch.exp(x / 3).sum(1, keepdim=True) for x in (wanted, own))
    assert value.item() == pytest.approx(9 * (p * (p / q).log()).sum(1).mean().item())
    (gradient,) = torch.autograd.grad(value, own)
    torch.testing.assert_close(gradient, 3 * (q - p).detach() / 6)


def test_the_cross_entropy_has_what_the_teacher_leaves():
    teacher = LossTerm(lambda *_: torch.tensor(5.0), weight=0.7)
    terms = make_loss_terms(0.0, label_smoothing=0.2, teacher=teacher)
    assert [(name, term.weight) for name, term in terms.items()] == [
        ("loss", pytest.approx(0.3)),
        ("regularizer", 1.0),
        ("distillation", 0.7),
    ]
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    smooth = 0.8 * F.one_hot(labels, 3) + 0.2 / 3
    expected = -(smooth * F.log_softmax(logits, 1)).sum(1).mean()
    torch.testing.assert_close(terms["loss"].value(None, None, logits, labels), expected)


def test_mixup_is_the_mean_of_two_images_and_of_their_labels():
    mix, images, labels = MixUp(0.4, 10, 0), torch.rand(8, 3, 4, 4), torch.arange(8)
    shown, targets = mix(images, labels, 2, 5)
    weight = targets[torch.arange(8), labels]
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    torch.testing.assert_close(shown, torch.einsum("ij,jchw->ichw", targets[:, :8], images))
    assert len(weight.unique()) <= 2  # one weight a batch, and 1 where an image meets itself
    assert all(torch.equal(a, b) for a, b in zip(mix(images, labels, 2, 5), (shown, targets), strict=True))
    assert not torch.equal(mix(images, labels, 2, 6)[0], shown)
    weights = [mix(images, labels, 0, step)[1].max(1).values.min().item() for step in range(300)]
    expected = np.random.default_rng(0).beta(0.4, 0.4, 4000)
    assert np.mean(weights) == pytest.approx(np.maximum(expected, 1 - expected).mean(), abs=0.03)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--validation", 1437], "at least one of each class is held out, and one stays"),
        (["--validation", 5], "--validation 5 of 1,437 training images, 10 classes"),
        (["--nesterov", "--optimizer", "adam"], "--nesterov is for --optimizer sgd"),
        (["--lr_type", "onecycle", "--warm_up"], "raises the learning rate by itself"),
        (["--lr_peak", 1], "--lr_peak 1.0 is too large: below 1"),
        (["--label_smoothing", 1], "too large"),
        (["--teacher", "none.pth.tar"], "none.pth.tar: there is no such file"),
        (["--teacher_weight", 1.5], "--teacher_weight 1.5 is too large: at most 1"),
        (["--temperature", 0], "--temperature 0.0 is too small: at least 0.01"),
        (["--temperature", 1e200], "too large: at most 1000"),
        (["--cutout", 9], "--cutout 9 is larger than the images, 8x8"),
        (["--mixup", -1], "too small"),
        (["--padding", "white"], "--padding"),
    ],
)
def test_bad_input(flags, message, refused, tmp_path):
    assert message in refused(*TINY, *flags, "--results_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_stays_the_one_that_a_run_began_with(teacher, command, refused, tmp_path):
    taught, run = tmp_path / "taught.pth.tar", tmp_path / "run"
    shutil.copy(teacher, taught)
    assert command(*TINY, "--epochs", 1, "--teacher", taught, "--results_dir", run)[0] == 0
    assert command("--results_dir", run, "--resume")[0] == 0
    shutil.copy(run / LATEST, taught)
    assert "is another file than the run began with" in refused("--results_dir", run, "--resume")


def test_a_teacher_that_has_seen_what_is_held_out_is_refused(teacher, refused, tmp_path):
    flags = [*TINY, "--teacher", teacher, "--validation", 200, "--results_dir", tmp_path / "run"]
    assert "was trained with none held out, so it may have seen what is to be evaluated" in refused(*flags)
    contents = read_checkpoint(teacher)
    contents["settings"]["dataset"] = "folder"  # which may be a copy of any
    save_checkpoint(contents, tmp_path / "folder.pth.tar")
    with pytest.raises(UsageError, match="it may have seen what is to be evaluated"):
        require_unseen(tmp_path / "folder.pth.tar", "digits", validation=200, seed=0)
    require_unseen(teacher, "cifar10", validation=200, seed=0)  # of another data set
    assert "that is a folder" in refused(*TINY, "--teacher", teacher.parent, "--results_dir", tmp_path / "run")


def test_a_teacher_of_other_images_is_refused(teacher, refused, tmp_path):
    flags = ["--dataset", "digits", "-a", "resnet20_1w1a", "--image_size", 16, "--results_dir", tmp_path / "run"]
    assert "was trained with image_size 8, this network has 16" in refused(*flags, "--teacher", teacher)


def test_what_is_for_images_in_memory_is_refused_for_streamed_ones(refused, tmp_path):
    data = photographs(tmp_path / "data", train=4, test=2)
    flags = ["--dataset", "folder", "--data_path", data, "--image_size", 32, "-b", 4, "--cutout", 8]
    assert "is read from files batch by batch" in refused(*flags, "--results_dir", tmp_path / "run", family="imagenet")
