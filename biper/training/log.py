"""What a run leaves to read: logger.log, metrics.csv, TensorBoard, and its progress on the terminal."""

import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from biper.errors import UsageError
from biper.files import write_rows
from biper.nn.layers import binary_layers
from biper.training.loop import Metrics

log = logging.getLogger("biper")
LOG_FILE, METRICS_FILE = "logger.log", "metrics.csv"
HISTOGRAMS, BINS = 50, 64  # of a layer in a run's TensorBoard, about; of a histogram: they are most of its file


class ConsoleHandler(logging.Handler):
    """Log lines to standard output, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def log_to_console(level: int = logging.INFO) -> None:
    """Show the log from a level up on standard output, once however often it is asked for."""
    log.setLevel(level)
    if not console():
        log.addHandler(ConsoleHandler())
    for handler in console():
        handler.setLevel(level)


def console() -> list[logging.Handler]:
    """What shows the log on standard output."""
    return [handler for handler in log.handlers if isinstance(handler, ConsoleHandler)]


class LogFile(logging.FileHandler):
    """A log file whose errors, such as a full disk, end the run instead of filling the terminal."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what emit met."""
        raise  # logging calls this inside its except block

    def add(self, text: str) -> None:
        """Write a line that is for the file alone."""
        self.handle(logging.makeLogRecord({"msg": text}))


def lock(file: logging.FileHandler, folder: Path) -> None:
    """Keep other processes out of a run's folder until its log is closed. Raises UsageError if one is in it."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    assert file.stream is not None  # opened at once
    try:
        fcntl.flock(file.stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UsageError(
            f"{folder} is in use by another process: wait for it, or give another --save or --results_dir"
        ) from error


def add_line(folder: Path, text: str) -> None:
    """Add a line to the log of a run that has ended. Without a log nothing is written."""
    if (folder / LOG_FILE).exists():
        file = LogFile(folder / LOG_FILE)
        file.add(text)
        file.close()


class Progress:
    """One pass's progress: a bar on a terminal, else a line every print_freq steps. A context and an loop.Watcher."""

    def __init__(self, title: str, steps: int, print_freq: int, first_step: int = 0) -> None:
        self.title, self.steps, self.print_freq = title, steps, print_freq
        quiet = any(handler.level > logging.INFO for handler in console())
        hidden = None if log.isEnabledFor(logging.INFO) and not quiet else True  # None: on a terminal alone
        self.bar = tqdm(
            total=steps, initial=first_step, desc=title, unit="step", disable=hidden, leave=False, dynamic_ncols=True
        )

    def advance(self, step: int, running: Metrics | None) -> None:
        """One step done; `running` are means that have arrived from the device."""
        self.bar.update()
        if running is None:
            return
        text = f"loss {running.loss:.4f} top-1 {running.top1:.2f} %"
        self.bar.set_postfix_str(text, refresh=False)
        if self.bar.disable:
            log.info("%s step %d/%d %s", self.title, step, self.steps, text)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


class Clock:
    """Time per epoch and the expected finish, from the epochs of this process."""

    def __init__(self, epochs_left: int) -> None:
        self.left, self.done, self.start, self.last = epochs_left, 0, time.monotonic(), time.monotonic()

    def tick(self) -> tuple[float, datetime]:
        """After an epoch: its seconds, and when the run is expected to end."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        self.done, self.left = self.done + 1, self.left - 1
        return seconds, datetime.now() + timedelta(seconds=self.left * (now - self.start) / self.done)


@contextmanager
def quiet_thread() -> Iterator[None]:
    """Context: TensorBoard's thread prints no traceback; whoever writes next, or closes it, is told what it met."""
    others = threading.excepthook

    def tell(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            others(args)

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = others


class Recorder:
    """Writes a run's files, epoch by epoch. A context; going on with a run appends to its log and TensorBoard."""

    def __init__(self, folder: Path, first_epoch: int, epochs: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.epochs = folder, epochs
        self.file = LogFile(folder / LOG_FILE)
        self.open = ExitStack()  # closes all of them, whatever one of them meets
        self.open.callback(self.file.close)
        lock(self.file, folder)
        self.open.enter_context(quiet_thread())
        try:
            # purge_step: what a killed run had logged of the epoch that is now repeated
            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch + 1)
        except OSError:
            self.open.close()
            raise
        self.open.callback(self.tensorboard._get_file_writer().close)  # which ends the thread first, and then may raise

    def __enter__(self) -> "Recorder":
        log.setLevel(logging.INFO)
        log.addHandler(self.file)
        self.open.callback(log.removeHandler, self.file)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            self.open.close()
            return
        with suppress(OSError):  # to the file alone: whoever catches it tells the user
            self.file.add(f"stopped by {kind.__name__}: {error}")
        with suppress(OSError):  # where nothing can be written, the first error counts
            self.open.close()

    def metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Rewrite metrics.csv, one row an epoch: it always agrees with the checkpoint, also after a kill."""
        write_rows(history, self.folder / METRICS_FILE)  # a column may be newer than the run's first epochs

    @torch.no_grad()
    def epoch(self, row: Mapping[str, Any], model: nn.Module, seconds: float) -> None:
        """TensorBoard's scalars and histograms of one epoch."""
        board, epoch = self.tensorboard, row["epoch"]
        for name, value in (*row.items(), ("seconds", seconds)):
            if name != "epoch":
                board.add_scalar(name.replace("_", "/", 1), value, epoch)
        if histograms_due(epoch, self.epochs):
            for name, layer in binary_layers(model):
                values = layer.weight_quantizer.real(layer.weight)
                board.add_histogram(f"sin(freq*w)/{name}", values, epoch, bins=BINS)
        board.flush()


def histograms_due(epoch: int, epochs: int) -> bool:
    """Whether an epoch, from 1 on, is one of those at even distances whose weights TensorBoard gets, or the last."""
    return epoch in (1, epochs) or epoch % -(-epochs // HISTOGRAMS) == 0


def metric_columns(prefix: str, metrics: Metrics) -> dict[str, float]:
    """A pass's metrics as columns of metrics.csv: the loss's terms, then the accuracies."""
    columns = {**metrics.terms, "top1": metrics.top1, "top5": metrics.top5}
    return {f"{prefix}_{name}": value for name, value in columns.items()}
