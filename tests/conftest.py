"""One thread per test process: the tests run side by side, and threads would spin for CPUs."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
