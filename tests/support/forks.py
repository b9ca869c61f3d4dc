"""Work in a fork of the test's process: it costs no imports, and may be killed."""

import gc
import os
import threading
import traceback
import warnings
from collections.abc import Callable

from tqdm import tqdm


def fork() -> int:
    """Fork, also where this process has threads, which newer Pythons warn of.

    The lock of tqdm is one for all forks: whoever is killed while he holds it would leave every
    later one waiting, so that each gets a lock of its own.

    What earlier tests left behind is not for the fork to collect: FFmpeg's scalers wait, when they
    are freed, for threads that only the parent has, for ever.
    """
    gc.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        tqdm.set_lock(threading.RLock())
    else:
        gc.unfreeze()
    return child


def ended(child: int) -> int:
    """Wait for a process and return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_fork(work: Callable[[], object]) -> int:
    """Work in a process group of its own and return how it ended, as `ended` does."""
    if child := fork():
        return ended(child)
    code = 1
    try:
        os.setsid()
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
