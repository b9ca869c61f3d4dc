import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_pipeline.errors import ConfigError, ExitCode, StoppedError
from karmma_pipeline.jobs import Part, StopFlag


@given(items=st.integers(0, 50), count=st.integers(1, 12))
def test_parts_cover_every_item_exactly_once(items: int, count: int) -> None:
    parts = [Part(i, count) for i in range(count)]
    owners = [sum(part.owns(item) for part in parts) for item in range(items)]
    assert owners == [1] * items


def test_a_part_is_written_as_a_person_counts() -> None:
    assert Part.parse("1/4") == Part(0, 4)
    assert Part.parse("4/4") == Part(3, 4)


@pytest.mark.parametrize("text", ["0/4", "5/4", "x", "1/0", "1/2/3", "-1/2", ""])
def test_a_wrong_part_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="part="):
        Part.parse(text)


def test_slurm_arrays_need_not_start_at_zero_nor_step_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"ID": "7", "MIN": "1", "MAX": "9", "STEP": "2", "COUNT": "5"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert Part.from_environment() == Part(3, 5)


def test_without_an_array_the_whole_work_is_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    assert Part.from_environment() == Part(0, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_sets_the_flag_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopFlag() as stop:
        stop.check("nothing yet")
        os.kill(os.getpid(), number)
        with pytest.raises(StoppedError, match=f"stopped by {number.name}: all saved") as caught:
            stop.check("all saved")
    assert caught.value.exit_code == ExitCode.STOPPED
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait() -> None:
    with StopFlag():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
