"""However a training ends, nothing that it started stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest
from conftest import ROOT, RUN, TINY, photographs
from recipes import write_recipe

from biper.data.pillow import count_cores
from biper.training.checkpoint import LATEST

STARTING, ENDING = 300, 20  # seconds that a busy machine may take for it

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


def marked(mark):
    """The numbers and command lines of all processes with a mark in their environment, whoever is their parent now."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_text()
        except OSError:  # it has ended, or is another user's
            continue
    return found


def wait_until(condition, seconds=ENDING):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


@pytest.fixture
def start():
    """start(*argv) -> (process, mark) of a command; at the end of the test all of it is gone."""
    started = []

    def run(*argv):
        mark = uuid4().hex
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MARK": mark}
        words = [str(a) for a in (sys.executable, "-u", *argv)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append((subprocess.Popen(words, env=environment, **pipes), mark))
        return started[-1]

    yield run
    for process, mark in started:
        for number in marked(mark):
            os.kill(number, signal.SIGKILL)
        process.communicate()


def test_readers_end_with_a_training_that_is_killed(start, tmp_path):
    data = photographs(tmp_path / "data", train=150, test=2)
    flags = [*RUN, "--data_path", data, "--workers", 2, "--epochs", 9, "-p", 1, "--results_dir", tmp_path / "run"]
    process, mark = start(ROOT / "imagenet" / "main.py", "--dataset", "folder", *flags)
    assert any(" step 2/" in line for line in iter(process.stdout.readline, ""))
    readers = min(2, count_cores())
    assert sum("forkserver" in line for line in marked(mark).values()) == 1 + readers  # and the server itself
    process.kill()
    assert wait_until(lambda: not marked(mark)), marked(mark)


def test_ranks_end_with_a_launcher_that_is_killed(start, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    flags = [*TINY, "--epochs", 999, "-p", 1, "--results_dir", tmp_path]
    process, mark = start(*torchrun, ROOT / "cifar10" / "main.py", *flags)
    assert any(" step 2/" in line for line in iter(process.stdout.readline, ""))
    assert len(marked(mark)) == 3
    process.kill()
    assert wait_until(lambda: not marked(mark)), marked(mark)


@pytest.mark.parametrize("killed", ["ablation", "job"])
def test_jobs_and_their_ablation_end_together(start, tmp_path, killed):
    recipe = write_recipe(tmp_path, epochs=999)
    flags = ["--jobs", 2, "--studies", "frequency", "--results_dir", tmp_path / "out"]
    process, mark = start(ROOT / "ablation.py", recipe, *flags)
    assert wait_until(lambda: any(tmp_path.rglob(LATEST)), STARTING)
    if killed == "ablation":
        process.kill()
    else:
        os.kill(max(number for number, line in marked(mark).items() if "spawn_main" in line), signal.SIGKILL)
        _, err = process.communicate(timeout=ENDING)
        assert process.returncode == 1
        assert "error: another process ended: one of --jobs; the same command goes on from what is saved" in err
    assert wait_until(lambda: not marked(mark)), marked(mark)
