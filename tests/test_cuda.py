"""What only a CUDA GPU can show; skipped without one."""

import sys

import pytest
import torch
from conftest import ROOT, TINY, photographs

from biper import create_model
from biper.data.digits import read_digits
from biper.data.loaders import build_loaders
from biper.data.memory import MemoryLoader, RandomCrop
from biper.models.checkpoint import read_checkpoint
from biper.training.checkpoint import BEST, LATEST
from biper.training.loop import train_one_epoch
from biper.training.loss import make_loss_terms
from biper.training.optimizer import build_optimizer, set_learning_rate
from biper.training.settings import make_settings
from biper.training.step import GraphedStep, PlainStep
from biper.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


class Watch:
    print_freq = 2

    def __init__(self):
        self.seen = []

    def advance(self, step, running):
        if running:
            self.seen.append(running)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_in_the_loop_waits_for_the_device():
    device = torch.device("cuda")
    model = create_model("resnet20_1w1a").to(device)
    train = MemoryLoader(
        read_digits(True, 32),
        batch_size=64,
        mean=(0.3,) * 3,
        std=(0.4,) * 3,
        device=device,
        augmentation=RandomCrop(2, True),
    )
    step = PlainStep(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), make_loss_terms(0.037))

    class Strict:
        device, weight = train.device, train.weight

        def epoch(self, epoch, first_step):
            torch.cuda.set_sync_debug_mode("error")  # from the first batch to the last
            try:
                yield from train.epoch(epoch, first_step)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    watch = Watch()
    for epoch, loader in enumerate((train, Strict(), Strict())):  # in the first, layers look at their signs, once
        train_one_epoch(step, loader, epoch=epoch, watcher=watch)
    assert watch.seen


def test_both_stages_and_resume(command, tmp_path, monkeypatch):
    def interrupted(trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt
        run_epoch(trainer)

    run_epoch, flags = Trainer.run_epoch, [*TINY, "--epochs", 2, "--gpus", "0", "--deterministic"]
    for name in ("whole", "one"):
        assert command(*flags, "--results_dir", tmp_path / name)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", interrupted)
        assert command(*flags, "--results_dir", tmp_path / "resumed")[0] == 130
    assert command(*flags, "--resume", "--results_dir", tmp_path / "resumed")[0] == 0
    states = [read_checkpoint(tmp_path / run / LATEST)["state_dict"] for run in ("whole", "one", "resumed")]
    for state in states[1:]:
        assert all(torch.equal(states[0][key], state[key]) for key in state)
    start = tmp_path / "one" / BEST
    code, out, err = command("--load_ckpt_stage1", start, "--epochs", 1, "--results_dir", tmp_path / "two", stage=2)
    assert code == 0, err
    assert torch.cuda.get_device_name(0) in out


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_recorded_steps_are_the_plain_ones(momentum):
    device, results = torch.device("cuda"), []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = create_model("resnet20_1w1a", stage=2, activation="rprelu").to(device).double()
        optimizer = build_optimizer(model, family="cifar10", name="sgd", lr=0.1, momentum=momentum, weight_decay=1e-3)
        step = PlainStep(model, optimizer, make_loss_terms(0.037))
        if recorded:
            graphed = step = GraphedStep(optimizer, device).take(step)
        losses = []
        for i in range(12):
            generator = torch.Generator().manual_seed(i)
            count = 7 if i % 3 == 2 else 16  # two shapes by turns, as at the end of an epoch
            images = torch.randn(count, 3, 32, 32, generator=generator).to(device).double()
            labels = torch.randint(10, (count,), generator=generator).to(device)
            set_learning_rate(optimizer, 0.1 / (i + 1))
            values, logits = step(images, labels, 1.0)
            losses.append(torch.stack([values["loss"], values["regularizer"], logits.sum()]).cpu())
        results.append((losses, model.state_dict()))
    (plain, a), (ours, b) = results
    assert graphed.works
    assert len(graphed.recordings) == 2
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


def test_training_says_that_it_records(command, tmp_path):
    for flags, said in (
        ([], "CUDA graphs"),
        (["--no-compile"], "plain torch\n"),
        (["--optimizer", "adamw"], "plain torch\n"),
    ):
        code, out, err = command(*TINY, "--epochs", 2, *flags, "--results_dir", tmp_path / "-".join(["run", *flags]))
        assert code == 0, err
        assert said in out
        assert "do not work here" not in out + err


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs")
def test_two_gpus(command, tmp_path):
    code, _, err = command(*TINY, "--epochs", 1, "--gpus", "0,1", "--results_dir", tmp_path)
    assert code == 0, err


def test_dali_decodes_on_the_gpu_what_pillow_decodes(tmp_path):
    pytest.importorskip("nvidia.dali")
    data = photographs(tmp_path, train=20, test=20, size=(300, 200))
    given = {"dataset": "folder", "data_path": str(data), "image_size": 64, "batch_size": 8, "batch_size_test": 8}
    both = [
        build_loaders(make_settings("imagenet", 1, given | {"use_dali": dali, "workers": 2}), torch.device("cuda", 0))
        for dali in (False, True)
    ]
    for split in ("test", "train"):
        for (x, k), (y, m) in zip(*(getattr(loaders, split).epoch() for loaders in both), strict=True):
            assert y.is_cuda
            assert torch.equal(k, m)
            assert (x - y).abs().mean() < 0.05  # nvJPEG upsamples colours in its own way


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs")
def test_two_processes_over_nccl(shell, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    result = shell(*launcher, ROOT / "cifar10" / "main.py", *TINY, "--epochs", 2, "--results_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "360 test images" in result.stdout
