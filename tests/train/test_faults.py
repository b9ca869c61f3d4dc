"""A few seconds of `tests/faults/trainer.py`; run that by hand for as long as you like."""

from collections.abc import Callable, Iterator

import pytest
from faults import trainer
from faults.trainer import Arena


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    made = Arena(tmp_path_factory.mktemp("arena"), seed=0)
    yield made
    made.close()


@pytest.mark.parametrize(
    "fault",
    [trainer.kill, trainer.flip, trainer.vanish, trainer.inject, trainer.fill, trainer.lock],
)
def test_a_hurt_training_says_why_and_ends_with_the_same_bytes(
    arena: Arena, fault: Callable[[Arena], None]
) -> None:
    if fault is trainer.inject and not trainer.STRACE:
        pytest.skip("strace is not installed")
    if fault in (trainer.fill, trainer.lock) and not arena.mounted:
        pytest.skip("only root can mount a small disk")
    for _ in range(2):
        fault(arena)
    trainer.torment(arena, 0.001, [fault])
    assert arena.counts["runs with equal bytes"] > 0
