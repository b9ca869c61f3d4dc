"""Which parameters of a test are worth their time every time."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_unless(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Return parameters of which all but the quick ones are marked slow."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]
