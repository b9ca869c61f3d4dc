"""A few of the faults of `python -m faults`; run that by hand for as long as you like."""

import random
import signal
from collections.abc import Iterator

import pytest
from faults import damage
from faults.trials import Trials


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    made = Trials("distill", tmp_path_factory.mktemp("faults") / "distill", None)
    yield made
    made.close()


@pytest.mark.parametrize("name", [*damage.DISK, *damage.LOST])
def test_a_hurt_training_says_why_and_ends_with_the_same_bytes(student: Trials, name: str) -> None:
    if name in damage.DISK and not student.mounted:
        pytest.skip("only root can mount a small disk")
    damage.hurt(student, random.Random(0), name)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
def test_a_training_that_is_stopped_anywhere_ends_with_the_same_bytes(
    student: Trials, number: int
) -> None:
    rng = random.Random(number)
    for _ in range(2):
        student.kill(rng, number, fresh=False)


def test_flipped_bytes_of_a_half_trained_student_are_noticed(student: Trials) -> None:
    student.clear()
    student.interrupt(0.6 * student.seconds(fresh=False), signal.SIGKILL, "", False)
    with damage.flipped(student, random.Random(0)):
        student.end("flipped bytes")
