"""Waiting for events instead of sleeping; a hang is ended, nothing else is held against a clock."""

import time
from collections.abc import Callable

PATIENCE_S = 900.0
"""However busy the machine is, what takes longer hangs."""


def wait_for(happened: Callable[[], object]) -> None:
    """Return as soon as something has happened."""
    hangs = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < hangs, f"still waiting for {happened} after {PATIENCE_S} s"
        time.sleep(0.005)
