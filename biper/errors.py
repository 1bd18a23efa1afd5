"""The errors of biper, and how a command ends with one: a line and an exit code."""

import gc
import os
import reprlib
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast


class UsageError(ValueError):
    """Something that the user can mend. The commands print it as one line and exit with code 2."""


class TrainingDiverged(RuntimeError):
    """The loss or a weight is no longer finite. The commands print it as one line and exit with code 1."""


class Different(RuntimeError):
    """A packed network does not compute what the checkpoint does."""


class CompilerMissing(RuntimeError):
    """There is no working C compiler, or nothing that it compiled; the message says why, in one line."""


class OutOfMemory(RuntimeError):
    """The memory of a device or of the machine does not suffice. The commands exit with code 2."""

    def __init__(self) -> None:
        super().__init__("out of memory: give a smaller -b (training) or -bt (evaluation)")


class WorkerLost(RuntimeError):
    """A process that reads images has ended; `what` says how, in one line. The commands exit with code 2."""

    def __init__(self, what: str) -> None:
        super().__init__(f"a process that reads images ended: give fewer --workers, or a smaller -b ({what})")


class ProcessLost(RuntimeError):
    """Another process of the training has ended; `what` says how, in one line. The commands exit with code 1."""

    def __init__(self, what: str) -> None:
        super().__init__(f"another process ended: {what}")


USERS = (UsageError, OutOfMemory, WorkerLost, OSError, MemoryError)  # what the user can mend: exit code 2
OTHERS = (TrainingDiverged, Different, ProcessLost)  # what went wrong though all was in order: exit code 1


def one_line(error: BaseException) -> str:
    """The first line of what an error says; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason(error: BaseException) -> str:
    """Why something failed, as a part of a line that names the file: a system's error without its number and name."""
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)


_SHORT = reprlib.Repr()  # a few levels and items of what a file holds, however deep or long it is
_SHORT.maxstring = _SHORT.maxother = 60


def shown(value: object) -> str:
    """A value as an error shows it: short, and in one line. There are values that Python itself refuses to show."""
    try:
        return " ".join(_SHORT.repr(value).split())
    except Exception:  # a whole number of 5,000 digits, and whatever other people's types may do
        return f"a value of type {type(value).__name__}"


def printable(text: str) -> str:
    """A text whose line ends, and whatever else no terminal shows, are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context: what is found wrong in the contents of a file is told as of that file."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{path} is damaged: {error}") from error


def told(error: BaseException) -> str:
    """What somebody else's code raised, in one line: its kind, what it says, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {one_line(error)}{place}"


def tell(text: str) -> None:
    """Write a line to standard error, if it is still there: a terminal that was closed takes none."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _write_nowhere(sys.stderr)


def _write_nowhere(stream: TextIO) -> None:
    """Let what a stream that is gone still holds, which Python flushes at exit, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Output:
    """Standard output, of which errors say that it is what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As the stream does. Raises BrokenPipeError if nobody reads it, UsageError if it cannot be written."""
        with _naming_output():
            return self._stream.write(text)

    def flush(self) -> None:
        """As the stream does, with the errors of `write`."""
        with _naming_output():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._stream, name)


def _named(error: BaseException) -> str:
    """What an error says; of the system's, with its file, or both of them."""
    if not (isinstance(error, OSError) and error.filename):
        return str(error)
    files = f"{error.filename} to {error.filename2}" if error.filename2 else error.filename
    return f"{files}: {reason(error)}"


def run_command(command: Callable[[], None]) -> None:
    """Run a command. Exits with 1 (it went wrong), 2 (bad input) or 128 + signal if it fails."""
    gc.set_threshold(20_000)  # of Python's own, a sixth of torch's import goes into finding no garbage
    if sys.stdout is None:  # closed by whoever started this: nobody reads it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    before, sys.stdout = sys.stdout, cast(TextIO, Output(sys.stdout))
    try:
        try:
            command()
        except SystemExit:  # of --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # here, and not by Python at exit, which tells errors in its own way
    except KeyboardInterrupt as error:
        _discard_output()  # of a terminal that was closed
        sys.exit(128 + signal.Signals.__members__.get(str(error), signal.SIGINT))
    except BrokenPipeError:  # `| head` has seen enough
        _discard_output()
        sys.exit(128 + signal.SIGPIPE)
    except (*USERS, *OTHERS) as error:
        _discard_output()
        rank = os.environ.get("RANK", "0")
        where = "error" if rank == "0" else f"error in process {rank}"
        tell(f"{where}: {printable(_named(error))}")
        sys.exit(1 if isinstance(error, OTHERS) else 2)
    finally:
        sys.stdout = before


@contextmanager
def _naming_output() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(f"standard output cannot be written: {error.strerror or error}") from error


def _discard_output() -> None:
    """Send what cannot be written, and what Python still flushes at exit, nowhere."""
    try:
        sys.stdout.flush()
    except (OSError, UsageError):
        _write_nowhere(sys.stdout)
