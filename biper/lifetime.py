"""Processes that end with the one that started them."""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import wait

POLL = 1.0  # seconds
# what reaches every process of a terminal: Ctrl-C, and that it is closed, which Windows does not tell
OF_TERMINALS = (signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


def end_with_parent() -> None:
    """Let this process end within seconds of the one that started it, however that one ended: by SIGKILL, too.

    What multiprocessing started waits for a pipe that the system closes with its parent. Neither PR_SET_PDEATHSIG nor
    the parent's number would do: a process that a fork server made is told of the end of that server, which in turn
    waits for the end of all that it made. Others (torchrun's) ask for that number, which changes when the parent ends.
    """
    parent, number = multiprocessing.parent_process(), os.getppid()

    def follow() -> None:
        if parent:
            wait([parent.sentinel])
        while not parent and os.getppid() == number:
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
