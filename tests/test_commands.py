"""The commands as users type them, in processes of their own."""

import os
import pty
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

from biper.models.checkpoint import read_checkpoint
from biper.training.checkpoint import BEST, LATEST

KILLS = 2
SCRIPTS = (
    "ablation.py",
    "cifar10/dataset/download.py",
    "cifar10/main.py",
    "cifar10/main_stage2.py",
    "compute_QE.py",
    "export.py",
    "imagenet/dataset/prepare.py",
    "imagenet/main.py",
    "imagenet/main_stage2.py",
    "predict.py",
    "reproduce.py",
    "summary.py",
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_a_wrong_flag_do_not_wait_for_torch(shell, script):
    start = time.monotonic()
    helped = shell(sys.executable, "-X", "importtime", ROOT / script, "--help")
    assert time.monotonic() - start < 5  # it takes a tenth of a second; torch alone would take seconds
    wrong = shell(sys.executable, "-X", "importtime", ROOT / script, "--no-such-flag")
    assert (helped.returncode, wrong.returncode) == (0, 2)
    assert helped.stdout.startswith(f"usage: {Path(script).name} ")
    assert f"(see {Path(script).name} --help)" in wrong.stderr
    for result in (helped, wrong):
        assert "torch" not in {line.split("|")[-1].strip() for line in result.stderr.splitlines()}


def test_help_says_which_stage_it_is(shell):
    for script, words in {"cifar10/main.py": "stage 1:", "imagenet/main_stage2.py": "stage 2:"}.items():
        assert words in shell(sys.executable, ROOT / script, "--help").stdout


def test_both_stages_and_evaluation_from_any_folder(shell, tmp_path):
    tiny = [*TINY, "--epochs", "1", "-p", "100"]
    first = shell("bash", ROOT / "run_stage1.sh", "cifar10", *tiny, "--results_dir", "one", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    flags = ["--dataset", "digits", "--epochs", "1", "-b", "256", "--results_dir", "two"]
    start = ["--load_ckpt_stage1", f"one/{BEST}"]
    second = shell("bash", ROOT / "run_stage2.sh", *flags, *start, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "BiPer stage 2: resnet20_1w1a, freq 20" in second.stdout
    (tmp_path / "random.py").write_text("raise SystemExit('of the folder, not of Python')\n")
    result = shell("bash", ROOT / "eval.sh", f"two/{BEST}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    best = next(line for line in second.stdout.splitlines() if line.startswith("best top-1"))
    assert f"top-1 {best.split()[2]} %" in result.stdout
    table = shell(sys.executable, ROOT / "compute_QE.py", f"two/{BEST}", "--plot", "qe.png", cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    assert (tmp_path / "qe.png").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "qe.png", "random.py", "two"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["eval.sh"], "usage: bash eval.sh CHECKPOINT"),
        (["eval.sh", "none"], "no checkpoint at none"),
        (["run_stage1.sh", "svhn"], "unknown data set family 'svhn'"),
        (["run_stage1.sh", "-b", "0"], "--batch_size 0"),
        (["run_stage2.sh", "--results_dir", "none"], "no checkpoint of stage 1 at /"),
    ],
)
def test_bad_input(shell, tmp_path, argv, message):
    result = shell("bash", ROOT / argv[0], *argv[1:], cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_of_eval(shell):
    result = shell("bash", "eval.sh", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: eval.sh ")
    assert "FILE" in result.stdout


def start(folder, *more):
    argv = [sys.executable, "-u", ROOT / "cifar10" / "main.py", *TINY, "--results_dir", folder, *more]
    return subprocess.Popen([str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_until(process, text):
    assert any(text in line for line in iter(process.stdout.readline, "")), process.stderr.read()


def test_kill_9_at_random_moments(tmp_path):
    """Killed at random moments and resumed each time, a run ends as an uninterrupted one."""
    flags = ["--epochs", KILLS + 2, "-p", 1]  # a line a step: ten an epoch
    whole = start(tmp_path / "whole", *flags)
    _, err = whole.communicate()
    assert whole.returncode == 0, err
    random.seed(0)
    for _ in range(KILLS):
        process = start(tmp_path / "cut", *flags, "--resume")
        read_until(process, "results in")
        for _ in range(random.randrange(13)):
            process.stdout.readline()
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it was running
    last = start(tmp_path / "cut", "--resume")
    _, err = last.communicate()
    assert last.returncode == 0, err
    for name in (LATEST, BEST):
        a, b = (read_checkpoint(tmp_path / run / name)["state_dict"] for run in ("whole", "cut"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert (tmp_path / "whole" / "metrics.csv").read_bytes() == (tmp_path / "cut" / "metrics.csv").read_bytes()
    assert not list((tmp_path / "cut").glob(".*"))


def test_a_terminal_that_is_closed_ends_a_run_cleanly(tmp_path):
    """How to go on is in its log, as nobody could read it elsewhere."""
    argv = [sys.executable, "-u", ROOT / "cifar10" / "main.py", *TINY, "--results_dir", tmp_path, "--epochs", 1000]
    main, terminal = pty.openpty()
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, which a process inherits
    process = subprocess.Popen(
        [str(a) for a in argv], stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    )
    signal.signal(signal.SIGHUP, before)
    os.close(terminal)
    seen = b""
    while b"epoch 1/1000  lr" not in seen:
        seen += os.read(main, 1000)
    os.close(main)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    last = (tmp_path / "logger.log").read_text().splitlines()[-1]
    assert "stopped by SIGHUP; what is saved stays. To go on from there: " in last
    assert last.endswith(f"--results_dir {tmp_path} --epochs 1000 --resume")
    assert read_checkpoint(tmp_path / LATEST)["epoch"] >= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_run_cleanly(tmp_path, number):
    process = start(tmp_path / "run", "--epochs", "1000")
    read_until(process, "epoch 1/1000  lr")
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"stopped by {signal.Signals(number).name}" in err
    assert "Traceback" not in err
    assert f"--results_dir {tmp_path}/run --epochs 1000 --resume" in err
    assert read_checkpoint(tmp_path / "run" / LATEST)["epoch"] >= 1
    assert not list((tmp_path / "run").glob(".*"))


def test_a_closed_pipe_ends_a_run_without_a_traceback(shell, tmp_path):
    """From the script's own folder, too."""
    flags = " ".join([*TINY, "--epochs", "100", "--results_dir", str(tmp_path / "run")])
    command = f"{sys.executable} -u main.py {flags} | head -2; exit ${{PIPESTATUS[0]}}"
    result = shell("bash", "-c", command, cwd=ROOT / "cifar10")
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")
    assert "BrokenPipeError" in (tmp_path / "run" / "logger.log").read_text()
