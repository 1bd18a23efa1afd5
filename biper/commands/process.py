"""What commands do with their process before and around their work."""

import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from biper.commands.importing import import_file
from biper.errors import UsageError, tell
from biper.lifetime import end_with_parent

if TYPE_CHECKING:
    from biper.training.distributed import Processes


def called_as() -> list[str]:
    """How this process was called, as words for the same shell: `biper train ...` or `python main.py ...`."""
    program, *words = sys.argv
    path = Path(program)
    if path.name == "__main__.py":  # python -m biper, whose file is not to be run by itself
        return [sys.executable, "-m", path.parent.name, *words]
    if path.suffix == ".py":
        return [sys.executable, program, *words]
    return [path.name if shutil.which(path.name) == program else program, *words]


def prepare_process(level: int = logging.INFO) -> "Processes":
    """Make this process ready to compute and to log, before its first tensor, and find its place among others.

    level: from which on the first process shows the log.
    """
    from biper.training.distributed import launched_by_torchrun, launched_processes
    from biper.training.log import log_to_console
    from biper.training.process import flush_denormals, keep_memory

    flush_denormals()
    keep_memory()
    if launched_by_torchrun():
        end_with_parent()  # which ends them all when one has ended, but not if it is killed itself
    processes = launched_processes()
    log_to_console(level if processes.main else logging.WARNING)
    return processes


def prepare_job(imported: Sequence[Path]) -> None:
    """Make a process that an experiment started ready to train, with the user's files; warnings alone are shown."""
    prepare_process(logging.WARNING)
    for path in imported:
        import_file(path)


def run_experiment(conduct: Callable[[], None]) -> None:
    """Conduct an experiment in this process alone; one that is interrupted says how it goes on."""
    from biper.training.process import signals_interrupt

    if prepare_process().size > 1:
        raise UsageError("an experiment runs in one process: train by torchrun with main.py, or give --gpus 0,1")
    try:
        with signals_interrupt():
            conduct()
    except KeyboardInterrupt as error:
        tell(f"stopped by {error}; what is saved stays: the same command goes on from there")
        raise
