"""The errors of biper, and how a command ends with one: a line and an exit code."""

import os
import signal
import sys
from collections.abc import Callable

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # of CUDA and of the CPU, in torch's words
WORKERS = ("DataLoader worker", "shared memory")  # of torch's loader
LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")  # of another process


class UsageError(ValueError):
    """Something that the user can mend. The commands print it as one line and exit with code 2."""


class TrainingDiverged(RuntimeError):
    """The loss or a weight is no longer finite. The commands print it as one line and exit with code 1."""


class Different(RuntimeError):
    """A packed network does not compute what the checkpoint does."""


class CompilerMissing(RuntimeError):
    """There is no working C compiler, or nothing that it compiled; the message says why, in one line."""


def one_line(error: BaseException) -> str:
    """The first line of what an error says; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_command(command: Callable[[], None]) -> None:
    """Run a command. Exits with 1 (it went wrong), 2 (bad input) or 128 + signal if it fails."""
    try:
        command()
    except KeyboardInterrupt as error:
        sys.exit(128 + (signal.SIGTERM if str(error) == "SIGTERM" else signal.SIGINT))
    except BrokenPipeError:  # `| head` has seen enough; what Python still flushes at exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (UsageError, TrainingDiverged, OSError, MemoryError, RuntimeError) as error:
        code, text = 2, str(error)
        if isinstance(error, TrainingDiverged | Different):
            code = 1
        elif isinstance(error, RuntimeError):
            if any(words in text for words in OUT_OF_MEMORY):
                text = "out of memory: give a smaller -b (training) or -bt (evaluation)"
            elif any(words in text for words in WORKERS):
                text = (
                    f"a process that reads images ended: give fewer --workers, or a smaller -b ({text.splitlines()[0]})"
                )
            elif any(words in text for words in LOST):
                code, text = 1, f"another process ended: {text.splitlines()[0]}"
            else:
                raise
        rank = os.environ.get("RANK", "0")
        print(f"error: {text}" if rank == "0" else f"error in process {rank}: {text}", file=sys.stderr)
        sys.exit(code)
