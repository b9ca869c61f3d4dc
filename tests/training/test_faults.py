"""A few of the faults of `python -m faults`; run that by hand for as long as you like."""

import random
from collections.abc import Iterator

import pytest
from faults import damage
from faults.calls import KILL, STOPS, Fault, PythonCalls
from faults.trials import Trials


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    folder = tmp_path_factory.mktemp("faults")
    made = Trials("distill", folder / "distill", PythonCalls(folder / "calls"))
    yield made
    made.close()


def states(student: Trials) -> list[int]:
    """The calls that put a training state into its place."""
    calls = enumerate(student.made, start=1)
    return [n for n, call in calls if call.startswith("rename") and call.endswith(".pt")]


@pytest.mark.parametrize("name", [*damage.DISK, *damage.LOST])
def test_a_hurt_training_says_why_and_ends_with_the_same_bytes(student: Trials, name: str) -> None:
    if name in damage.DISK and not student.mounted:
        pytest.skip("only root can mount a small disk")
    damage.hurt(student, random.Random(0), name)


@pytest.mark.parametrize("fault", [KILL, *STOPS], ids=lambda fault: fault.name)
def test_a_training_that_is_stopped_anywhere_ends_with_the_same_bytes(
    student: Trials, fault: Fault
) -> None:
    saved = states(student)
    rng = random.Random(fault.name)
    for number in (rng.randrange(1, saved[0]), rng.randrange(saved[0], saved[-3])):
        assert student.hit(number, fault).endswith("exit -9" if fault is KILL else "exit 75")


def test_flipped_bytes_of_a_half_trained_student_are_noticed(student: Trials) -> None:
    student.clear()
    student.kill_at(states(student)[3] + 1)
    assert len(list(student.work.glob("run/state/*.pt"))) == 2
    with damage.flipped(student, random.Random(0)):
        student.end("flipped bytes")
