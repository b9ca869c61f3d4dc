"""Every test is the same each time: its chance is seeded, and no clock ends it but a hang's.

One thread per test process: the tests run side by side, and threads would spin for CPUs.
"""

import os

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("seeded")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Draw the same random tensors whatever tests ran before in this process."""
    import torch

    torch.manual_seed(0)
