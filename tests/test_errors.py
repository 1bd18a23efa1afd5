"""How a command ends: the exit code and the one line of an error."""

import io
import os
import signal
import sys

import pytest
import torch
from conftest import photographs
from tqdm import tqdm

from biper.data.loaders import build_loaders
from biper.errors import OutOfMemory, ProcessLost, TrainingDiverged, UsageError, WorkerLost, run_command
from biper.training.log import log, log_to_console
from biper.training.settings import make_settings


def failing(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("bad input"), 2, "error: bad input\n"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (OSError(28, "No space left on device", "/a"), 2, "error: /a: No space left on device\n"),
        (OSError(18, "Other device", "/a", None, "/b"), 2, "error: /a to /b: Other device\n"),
        (OutOfMemory(), 2, "error: out of memory: give a smaller -b (training) or -bt (evaluation)\n"),
        (
            WorkerLost("killed"),
            2,
            "error: a process that reads images ended: give fewer --workers, or a smaller -b (killed)\n",
        ),
        (ProcessLost("closed by peer"), 1, "error: another process ended: closed by peer\n"),
        (TrainingDiverged("the loss is nan"), 1, "error: the loss is nan\n"),
        (KeyboardInterrupt("SIGTERM"), 143, ""),
        (KeyboardInterrupt("SIGHUP"), 129, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_the_kind_of_an_error_decides(capsys, error, code, line):
    with pytest.raises(SystemExit) as caught:
        run_command(failing(error))
    assert caught.value.code == code
    assert capsys.readouterr().err == line


def test_what_is_nobodys_fault_but_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="out of memory, shared memory, gloo"):
        run_command(failing(RuntimeError("out of memory, shared memory, gloo")))


@pytest.mark.parametrize("unbuffered", [True, False])
@pytest.mark.parametrize("text", ["a line", "many lines\n" * 10_000])
@pytest.mark.parametrize("logged", [True, False])
def test_output_that_cannot_be_written_is_named(capsys, monkeypatch, unbuffered, text, logged):
    with open("/dev/full", "wb", 0) as raw:
        output = io.TextIOWrapper(raw if unbuffered else io.BufferedWriter(raw), write_through=unbuffered)
        monkeypatch.setattr(sys, "stdout", output)
        log_to_console()
        with pytest.raises(SystemExit) as caught:
            run_command(lambda: log.warning(text) if logged else print(text))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: standard output cannot be written: No space left on device\n"


def test_output_that_is_closed_is_not_missed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    log_to_console()
    run_command(lambda: log.warning("a line"))
    sys.stdout.close()


@pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full", ">&- 2>&-"])
def test_errors_that_cannot_be_written(shell, redirected):
    assert shell("bash", "-c", f"{sys.executable} -m biper nonsense {redirected}").returncode == 2
    told = shell("bash", "-c", f"{sys.executable} -m biper evaluate none 2>&-")
    assert (told.returncode, told.stdout) == (2, "")


def test_training_goes_on_without_standard_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    run_command(lambda: list(tqdm(range(3))))
    sys.stderr.close()


def test_a_reading_process_that_is_killed(tmp_path):
    data = photographs(tmp_path, train=40, test=2)
    given = {"dataset": "folder", "data_path": str(data), "image_size": 32, "batch_size": 2, "workers": 1}
    loader = build_loaders(make_settings("imagenet", 1, given), torch.device("cpu")).train
    batches = loader.epoch()
    next(batches)
    (worker,) = loader.reader.loader._iterator._workers
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerLost, match="give fewer --workers"):
        list(batches)
