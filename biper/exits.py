"""How a command ends: an error becomes one line and an exit code."""

import os
import signal
import sys
from collections.abc import Callable

from biper.errors import Different, TrainingDiverged, UsageError

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # of CUDA and of the CPU, in torch's words
WORKERS = ("DataLoader worker", "shared memory")  # of torch's loader
LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")  # of another process


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
