"""Who may write into a folder: the living holder of its lock, on whatever machine."""

import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from support.forks import ended, fork

from karmma_pipeline import locks
from karmma_pipeline.errors import KarmmaError

ELSEWHERE = "node7 12 55 0 another-boot.4026531836 99"


def taken(path: Path) -> None:
    with locks.locked(path, "works here"):
        assert path.read_text().split()[:2] == [socket.gethostname(), str(os.getpid())]


def test_a_lock_names_its_living_holder_and_is_free_once_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/.lock"
    hold = (
        "import pathlib, sys, time\n"
        "from karmma_pipeline import locks\n"
        "with locks.locked(pathlib.Path(sys.argv[1]), 'works here'):\n"
        "    print(flush=True)\n"
        "    sys.stdin.read()\n"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", hold, str(path)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as other:
        assert other.stdout is not None
        other.stdout.readline()
        sentence = f"process {other.pid} on {socket.gethostname()} works here; wait"
        with pytest.raises(KarmmaError, match=sentence):
            taken(path)
        assert locks.holder(path)
        other.send_signal(signal.SIGKILL)
    assert not locks.holder(path)
    taken(path)
    assert [p.name for p in path.parent.iterdir()] == []


def test_folders_that_a_lock_made_go_with_it_and_others_stay(tmp_path: Path) -> None:
    taken(tmp_path / "a/b/.lock")
    assert not (tmp_path / "a").exists()
    (tmp_path / "c").mkdir()
    taken(tmp_path / "c/.lock")
    assert (tmp_path / "c").is_dir()


def test_a_lock_of_another_machine_holds_as_long_as_it_is_touched(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text(ELSEWHERE)
    now = path.stat().st_mtime
    os.utime(path, (now, now - locks.DEAD_S / 2))
    sentence = r"process 12 on node7 \(job 55\) works here; wait .* expires within 180 s"
    with pytest.raises(KarmmaError, match=sentence):
        taken(path)
    os.utime(path, (now, now - locks.DEAD_S - 60))
    taken(path)


def test_a_requeued_job_takes_its_own_lock_and_a_job_beside_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".lock"
    path.write_text(ELSEWHERE)
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    with pytest.raises(KarmmaError, match="node7"):  # another task of the same job
        taken(path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    taken(path)


def test_an_older_programs_lock_of_another_machine_never_ages(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text("node7 12 -")
    os.utime(path, (0, 0))
    with pytest.raises(KarmmaError, match="node7"):
        taken(path)
    path.write_text(f"{socket.gethostname()} 999999999 -")
    taken(path)


def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path: Path) -> None:
    for number in range(20):
        path = tmp_path / str(number)
        path.write_text(ELSEWHERE)
        os.utime(path, (0, 0))
        start = threading.Barrier(8)

        def attempt(_: int, path: Path = path, start: threading.Barrier = start) -> str:
            start.wait()
            with suppress(KarmmaError):
                return locks._take(path, "works here", "wait")
            return ""

        with ThreadPoolExecutor(8) as pool:
            got = [text for text in pool.map(attempt, range(8)) if text]
        assert len(got) == 1
        assert [p.name for p in tmp_path.glob(f".{number}.*")] == []


def test_a_holder_that_lost_its_lock_is_told_and_leaves_the_other_ones(tmp_path: Path) -> None:
    path = tmp_path / ".lock"

    def suspended() -> None:
        with locks.locked(path, "works here"):
            locks.check(path)
            path.write_text(ELSEWHERE)
            locks.check(path)

    with pytest.raises(KarmmaError, match=r"process 12 on node7 .* took over this folder"):
        suspended()
    assert path.read_text() == ELSEWHERE


def test_a_holder_touches_its_lock_and_a_fork_of_it_does_not_let_it_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.01)
    path = tmp_path / ".lock"
    held = locks.locked(path, "works here")
    with held:
        os.utime(path, (0, 0))
        while path.stat().st_mtime == 0:
            threading.Event().wait(0.01)
        child = fork()
        if not child:
            held.__exit__(None, None, None)
            os._exit(0)
        assert ended(child) == 0
        assert path.is_file()
    assert not path.exists()


def test_a_disk_without_hard_links_has_locks_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    with locks.locked(tmp_path / "l", "works here"), pytest.raises(KarmmaError, match="works here"):
        taken(tmp_path / "l")
