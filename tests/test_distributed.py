"""Several processes, started by torchrun as a user starts them (gloo on the CPU)."""

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

import first_step
import pytest
import torch
from conftest import ROOT, TINY, photographs

from biper.errors import UsageError
from biper.models.checkpoint import read_checkpoint
from biper.training import build, distributed
from biper.training.checkpoint import BEST, LATEST
from biper.training.distributed import Processes, launched_processes, restartable
from biper.training.process import select_devices

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def torchrun(shell, processes, *argv, **options):
    return shell(*TORCHRUN, processes, *argv, env={"OMP_NUM_THREADS": "1"}, **options)


def test_place_among_the_processes():
    assert launched_processes({}) == Processes()
    assert launched_processes({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Processes(5, 8, 1)
    assert not restartable({"TORCHELASTIC_MAX_RESTARTS": "0"})
    assert restartable({"TORCHELASTIC_MAX_RESTARTS": "1", "TORCHELASTIC_RESTART_COUNT": "0"})


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    place = Processes(rank=5, size=8, local_rank=1)
    assert select_devices("auto", "0", "", place) == [torch.device("cuda", 1)]
    assert select_devices("auto", "3,2", "", place) == [torch.device("cuda", 2)]
    with pytest.raises(UsageError, match="no GPU for process 5 of this machine: it may use 4"):
        select_devices("auto", "0", "", Processes(4, 8, 4))


def test_the_first_step_and_evaluation_equal_those_of_one_process(shell, monkeypatch, tmp_path):
    """Uneven shards: 22 training images in batches of 8, 10 test images in batches of 6."""
    loaders = ["pillow", "dali"] if find_spec("nvidia") and find_spec("nvidia.dali") else ["pillow"]
    data = photographs(tmp_path / "data", train=11, test=5)
    monkeypatch.setattr(build, "initial_network", build.initial_network)  # which is put back
    first_step.main(str(data), 32, str(tmp_path / "one.pt"), loaders)
    two = torchrun(shell, 2, first_step.__file__, data, 32, tmp_path / "two.pt", *loaders)
    assert two.returncode == 0, two.stderr
    alone, together = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    assert list(alone) == list(together) == loaders
    for loader in loaders:
        first, second = alone[loader], together[loader]
        assert first["gradients"].keys() == second["gradients"].keys()
        for name, gradient in first["gradients"].items():
            # half a batch is added up in another order; a gradient of alpha that almost cancels loses some digits more
            atol = 1e-10 * gradient.abs().max().item()
            torch.testing.assert_close(second["gradients"][name], gradient, rtol=0, atol=atol, msg=f"{loader}: {name}")
        assert second["metrics"].pop("loss") == pytest.approx(first["metrics"].pop("loss"), rel=1e-10)
        assert first["metrics"] == second["metrics"]
        assert first["metrics"]["count"] == 10
    if "dali" not in loaders:
        pytest.skip("without DALI the first step was compared with Pillow alone")


def test_a_run_of_two_processes_and_its_evaluation(shell, command, tmp_path):
    run = tmp_path / "run"
    result = torchrun(shell, 2, ROOT / "cifar10" / "main.py", *TINY, "--epochs", 2, "--results_dir", run)
    assert result.returncode == 0, result.stderr
    assert "1,437 training and 360 test images" in result.stdout
    assert ", 2 processes" in result.stdout
    assert result.stdout.count("epoch 2/2  lr") == 1  # one process speaks
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    best = max(rows, key=lambda row: float(row["test_top1"]))
    expected = f"top-1 {float(best['test_top1']):.2f} %"
    two = torchrun(shell, 2, "-m", "biper", "-e", run / BEST, "-bt", 97)
    for code, out, err in (command("-e", run / BEST, family=None), (two.returncode, two.stdout, two.stderr)):
        assert code == 0, err
        assert expected in out
        assert "(360 images)" in out


def test_a_killed_process_is_started_again_and_the_run_ends(tmp_path):
    run = tmp_path / "run"
    argv = [*TORCHRUN, 2, "--max_restarts", 1, ROOT / "cifar10" / "main_stage2.py", *TINY, "--epochs", 8]
    argv += ["--from_scratch", "--quantizer", "irnet"]  # which changes over training
    argv = [str(a) for a in (*argv, "--results_dir", run)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(argv, env=environment, **pipes) as process:
        watchdog = threading.Timer(300, process.kill)
        watchdog.start()
        seen = []
        for line in iter(process.stdout.readline, ""):
            seen.append(line)
            if "epoch 2/8  lr" in line:
                break
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        assert len(workers) == 2, "".join(seen)
        os.kill(int(workers[-1]), signal.SIGKILL)
        rest = process.stdout.read()
        watchdog.cancel()
    assert process.returncode == 0, "".join(seen) + rest
    assert re.search(r"--resume: going on after [2-7] of 8 epochs", rest)
    assert read_checkpoint(run / LATEST)["epoch"] == 8
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == [str(i) for i in range(1, 9)]


def test_a_batch_that_the_processes_cannot_share(shell, tmp_path):
    result = torchrun(shell, 2, ROOT / "cifar10" / "main.py", *TINY, "-b", 255, "--results_dir", tmp_path / "run")
    assert result.returncode == 1  # torchrun's own
    assert "error: -b 255 cannot be divided among 2 processes: give a multiple of them" in result.stderr
    assert "main.py FAILED" in result.stderr
    assert not re.search(rf'File "{re.escape(str(ROOT))}/(biper|cifar10)/', result.stderr)
    assert not (tmp_path / "run").exists()


def test_other_processes_that_cannot_be_reached(shell, tmp_path):
    lonely = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": ""}
    started = time.monotonic()
    result = shell(sys.executable, ROOT / "cifar10" / "main.py", *TINY, "--results_dir", tmp_path / "run", env=lonely)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "cannot join the other processes" in result.stderr
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(("beside", "text"), [(True, "a fault of its own"), (False, "Connection reset by peer")])
def test_a_networks_own_errors_pass(monkeypatch, beside, text):
    monkeypatch.setattr(distributed, "joint", lambda: beside)
    with pytest.raises(RuntimeError) as caught, distributed.step_of_replicas():
        raise RuntimeError(text)
    assert type(caught.value) is RuntimeError


def test_a_lost_process_is_named_by_the_others():
    """Without a launcher, which would end the other process before it has noticed."""
    code = """
import os, torch
from biper.errors import run_command
from biper.training import distributed as d
def lose():
    processes = d.launched_processes()
    with d.joined(processes):
        model = d.replicated(torch.nn.Linear(4, 4))
        model(torch.ones(2, 4)).sum().backward()
        if processes.rank:
            os._exit(3)
        with d.step_of_replicas():
            {step}
run_command(lose)
"""
    steps = {"gradients": "model(torch.ones(2, 4)).sum().backward()", "sum": "d.all_reduce_sum(torch.ones(3))"}
    for step in steps.values():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pipes = {"stderr": subprocess.PIPE, "text": True}
        argv = [sys.executable, "-c", code.format(step=step)]
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        main, other = (subprocess.Popen(argv, env=environment | rank, **pipes) for rank in ranks)
        err = main.communicate(timeout=120)[1]
        other.communicate(timeout=120)
        assert main.returncode == 1, err
        assert err.startswith("error: another process ended: "), err
        assert err.count("\n") == 1
