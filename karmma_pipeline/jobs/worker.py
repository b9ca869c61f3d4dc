"""What a worker process owes its main process."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait

from karmma_pipeline.jobs.stop import STOP_SIGNALS


def become_worker() -> None:
    """Leave the stop signals to the main process, and end when that is gone.

    A main process that is killed with SIGKILL tells nobody: its workers would wait for ever.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=[parent.sentinel], daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
