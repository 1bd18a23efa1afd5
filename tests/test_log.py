import csv
import logging
import threading
from datetime import datetime, timedelta

import pytest

from biper import create_model
from biper.errors import UsageError
from biper.training.log import Clock, Progress, Recorder, histograms_due, log, log_to_console, metric_columns
from biper.training.loop import Metrics

ROW = {"epoch": 1, "lr": 0.1, "tau": 0.0, "train_loss": 2.0, "test_top1": 10.0}


def test_metrics_file_is_rewritten_whole(tmp_path):
    with Recorder(tmp_path, 0, 2) as recorder:
        recorder.metrics([ROW])
        recorder.metrics([ROW, ROW | {"epoch": 2, "train_loss": 1 / 3}])
        recorder.epoch(ROW, create_model("resnet20_1w1a"), 1.5)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) == 1 / 3  # every bit
    assert not list(tmp_path.glob(".*"))


def test_the_log_says_why_a_run_ended_and_goes_on(tmp_path):
    def interrupted():
        with Recorder(tmp_path, 0, 2):
            log.info("first")
            raise KeyboardInterrupt("SIGTERM")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with Recorder(tmp_path, 1, 2):
        log.info("second")
    text = (tmp_path / "logger.log").read_text()
    assert [word in text for word in ("first", "stopped by KeyboardInterrupt: SIGTERM", "second")] == [True] * 3
    assert not any(isinstance(handler, logging.FileHandler) for handler in log.handlers)


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys):
    log_to_console()
    log_to_console()
    with Progress("epoch 1/2", 10, 5) as progress:
        progress.advance(1, None)
        progress.advance(5, Metrics({"loss": 1.25}, 50.0, 90.0, 100))
    assert capsys.readouterr().out == "epoch 1/2 step 5/10 loss 1.2500 top-1 50.00 %\n"


def test_two_processes_do_not_share_a_folder(tmp_path):
    with Recorder(tmp_path, 0, 2), pytest.raises(UsageError, match="in use by another process"):
        Recorder(tmp_path, 0, 2)
    with Recorder(tmp_path, 0, 2):
        pass


def test_a_full_disk_is_told_once_and_everything_is_closed(tmp_path, small_disk):
    """Not by TensorBoard's thread too, whose traceback would be an error here."""
    hook = threading.excepthook
    with pytest.raises(OSError, match="File too large"), Recorder(tmp_path, 0, 2) as recorder, small_disk(1000):
        recorder.epoch(ROW, create_model("resnet20_1w1a"), 1.5)
    assert threading.excepthook is hook
    assert recorder.file not in log.handlers
    with Recorder(tmp_path, 0, 2):
        pass


@pytest.mark.parametrize(("epochs", "most"), [(1, 1), (30, 30), (300, 51), (400, 51), (1000, 51)])
def test_histograms_are_few_and_of_the_last_epoch_too(epochs, most):
    due = [epoch for epoch in range(1, epochs + 1) if histograms_due(epoch, epochs)]
    assert most - 15 <= len(due) <= most
    assert (due[0], due[-1]) == (1, epochs)


def test_clock():
    clock = Clock(epochs_left=11)
    clock.start -= 60
    clock.last -= 60
    seconds, finish = clock.tick()
    assert seconds == pytest.approx(60, abs=1)
    assert abs(finish - datetime.now() - timedelta(minutes=10)) < timedelta(seconds=15)


def test_columns():
    train = Metrics({"loss": 1.0, "regularizer": 2.0, "teacher": 2.5}, 3.0, 4.0, 5)
    columns = metric_columns("train", train)
    assert columns == {
        "train_loss": 1.0,
        "train_regularizer": 2.0,
        "train_teacher": 2.5,
        "train_top1": 3.0,
        "train_top5": 4.0,
    }
    assert list(columns)[:2] == ["train_loss", "train_regularizer"]
    test = Metrics({"loss": 1.0}, 3.0, 4.0, 5)
    assert metric_columns("test", test) == {"test_loss": 1.0, "test_top1": 3.0, "test_top5": 4.0}
