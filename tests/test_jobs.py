import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import forks
from support.patience import PATIENCE_S, wait_for
from support.starting import Started, blocked, ignored

from karmma_pipeline.errors import ConfigError, ExitCode, StoppedError
from karmma_pipeline.jobs import Part, StopFlag, balance, cpu_count, memory_limit
from karmma_pipeline.jobs.batch_system import (
    JOB,
    ONE_OF_SEVERAL,
    STOP_SIGNALS,
    become_worker,
    without,
)
from karmma_pipeline.jobs.processes import WorkerPool

COSTS = st.lists(st.floats(0, 1e6), max_size=40)


@given(costs=COSTS, count=st.integers(1, 12))
def test_parts_cover_every_shard_exactly_once(costs: list[float], count: int) -> None:
    owned = [shard for i in range(count) for shard in Part(i, count).shards(costs)]
    assert sorted(owned) == list(range(len(costs)))


@given(costs=COSTS, count=st.integers(1, 12))
def test_no_part_is_longer_than_grahams_bound(costs: list[float], count: int) -> None:
    loads = [sum(costs[item] for item in part) for part in balance(costs, count)]
    bound = sum(costs) / count + (1 - 1 / count) * max(costs, default=0)
    assert max(loads) <= bound * (1 + 1e-9)


@given(costs=st.lists(st.integers(0, 20), min_size=1, max_size=6), count=st.integers(2, 3))
def test_no_part_is_longer_than_four_thirds_of_the_best(costs: list[int], count: int) -> None:
    best = min(
        max(sum(c for c, p in zip(costs, places, strict=True) if p == part) for part in places)
        for places in product(range(count), repeat=len(costs))
    )
    assert max(sum(costs[i] for i in part) for part in balance(costs, count)) <= best * 4 / 3


@given(count=st.integers(1, 9), items=st.integers(0, 40))
def test_equal_shards_are_shared_out_evenly(count: int, items: int) -> None:
    sizes = [len(part) for part in balance([0.0] * items, count)]
    assert max(sizes) - min(sizes) <= 1


def test_a_duration_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        balance([1.0, float("nan")], 2)


def test_a_part_is_written_as_a_person_counts() -> None:
    assert Part.parse("1/4") == Part(0, 4)
    assert Part.parse("4/4") == Part(3, 4)
    assert str(Part(3, 4)) == "4/4"


@pytest.mark.parametrize("text", ["0/4", "5/4", "x", "1/0", "1/2/3", "-1/2", ""])
def test_a_wrong_part_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="part="):
        Part.parse(text)


def slurm(number: int, first: int, step: int, count: int) -> dict[str, str]:
    values = {"ID": number, "MIN": first, "STEP": step, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({}, Part(0, 1)),
        (slurm(7, 1, 2, 5), Part(3, 5)),  # --array=1-9:2
        (slurm(0, 0, 1, 4), Part(0, 4)),
        ({**slurm(7, 3, 4, 2), "KARMMA_PARTS": "8"}, Part(6, 8)),  # --array=3,7 of 8
        ({"PBS_ARRAY_INDEX": "3", "KARMMA_PARTS": "8"}, Part(2, 8)),
        ({"PBS_ARRAYID": "8", "KARMMA_PARTS": "8"}, Part(7, 8)),
        ({"LSB_JOBINDEX": "4", "LSB_JOBINDEX_END": "8"}, Part(3, 8)),
        ({"LSB_JOBINDEX": "3", "LSB_JOBINDEX_END": "9", "LSB_JOBINDEX_STEP": "2"}, Part(1, 5)),
        ({"LSB_JOBINDEX": "0", "LSB_JOBINDEX_END": "0"}, Part(0, 1)),  # not an array
        (
            {
                "SGE_TASK_ID": "6",
                "SGE_TASK_FIRST": "2",
                "SGE_TASK_LAST": "8",
                "SGE_TASK_STEPSIZE": "2",
            },
            Part(2, 4),
        ),
        ({"SGE_TASK_ID": "undefined"}, Part(0, 1)),
    ],
)
def test_batch_systems_tell_the_part(environment: dict[str, str], part: Part) -> None:
    assert Part.from_environment(environment) == part


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PBS_ARRAY_INDEX": "3"}, "does not report the number of"),
        (slurm(7, 3, 1, 2), "KARMMA_PARTS"),  # a list with gaps
        ({**slurm(0, 0, 1, 8), "KARMMA_PARTS": "8"}, "tasks from 1"),
        ({"KARMMA_PARTS": "8"}, "not an array task"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_COUNT=''"),
        ({"LSB_JOBINDEX": "x", "LSB_JOBINDEX_END": "8"}, "LSB_JOBINDEX='x'"),
    ],
)
def test_a_part_that_cannot_be_known_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Part.from_environment(environment)


def test_a_part_says_who_wants_it() -> None:
    several = {**slurm(7, 3, 4, 2), "KARMMA_PARTS": "8"}
    assert Part.from_environment(several).why == "SLURM_ARRAY_TASK_ID=7 and KARMMA_PARTS=8"
    assert Part.from_environment(slurm(7, 1, 2, 5)).why == "SLURM_ARRAY_TASK_ID=7"
    assert Part.parse("2/3").why == "--part 2/3"


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_several_processes_that_would_all_do_the_same_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=3: 3 processes .* --part i/n"):
        Part.from_environment({name: "3", **slurm(1, 1, 1, 2)})
    assert Part.from_environment({name: "1"}) == Part(0, 1)


def test_a_job_inside_a_job_keeps_what_the_user_has_set_and_nothing_of_the_outer_one() -> None:
    users = {"PATH": "/bin", "SLURM_CONF": "/etc/s", "SBATCH_ACCOUNT": "p", "TORCH_HOME": "/t"}
    limits = {"SLURM_CPUS_PER_TASK": "3", "SLURM_JOB_ID": "5", "CUDA_VISIBLE_DEVICES": "2"}
    outer = slurm(2, 1, 1, 3)
    outer |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_MEM_PER_CPU": "100", "PBS_ARRAY_INDEX": "1"}
    outer |= {"SGE_TASK_ID": "1", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n"}
    outer |= {"TORCHELASTIC_RUN_ID": "x", "KARMMA_PARTS": "3", "NSLOTS": "4"}
    assert without(JOB, {**users, **limits, **outer}) == users
    left = without(ONE_OF_SEVERAL, {**users, **limits, **outer})
    memory = {"SLURM_MEM_PER_CPU": "100", "NSLOTS": "4"}  # limits hold for processes inside the job
    assert left == {**users, **limits, **memory}


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_the_handlers_come_back(number: signal.Signals) -> None:
    outer = signal.signal(number, signal.default_int_handler)  # ignored in tests under nohup
    try:
        with StopFlag() as stop:
            stop.check("nothing yet")
            os.kill(os.getpid(), number)
            with pytest.raises(
                StoppedError, match=f"stopped by {number.name}: all saved"
            ) as caught:
                stop.check("all saved")
        assert caught.value.exit_code == ExitCode.STOPPED
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, outer)


def test_a_command_under_nohup_goes_on_when_its_terminal_goes() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_interrupt_says_so_and_the_second_ends_at_once(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def interrupted_twice() -> None:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested
            os.kill(os.getpid(), signal.SIGINT)

    assert forks.in_fork(interrupted_twice) == ExitCode.STOPPED
    first, second = capfd.readouterr().err.split()[0], capfd.readouterr().err
    assert first == "stopping"
    assert not second


def cgroups(root: Path, lines: str, limits: dict[str, str]) -> Path:
    """Write a fake tree of control groups."""
    for path, text in {"proc/self/cgroup": lines, **limits}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")
    return root


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


V1 = "4:memory:/slurm/job_1\n2:cpu,cpuacct:/slurm/job_1\n1:name=systemd:/"


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    ("lines", "limits", "cpus"),
    [
        ("0::/a/b", {}, 8),
        ("0::/a/b", {"sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 8),
        ("0::/a/b", {"sys/fs/cgroup/a/b/cpu.max": "250000 100000"}, 2),
        ("0::/a/b", {"sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),  # from above
        ("0::/a/b", {"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),  # a container: never 0
        (V1, {"sys/fs/cgroup/cpu,cpuacct/slurm/job_1/cpu.cfs_quota_us": "-1"}, 8),
        (
            V1,
            {
                "sys/fs/cgroup/cpu/slurm/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/slurm/cpu.cfs_period_us": "100000",
            },
            4,
        ),
    ],
)
def test_cpus_follow_the_quota(
    lines: str, limits: dict[str, str], cpus: int, tmp_path: Path
) -> None:
    assert cpu_count(cgroups(tmp_path, lines, limits), {}) == cpus


@pytest.mark.usefixtures("eight_cpus")
def test_cpus_follow_affinity_and_the_batch_system(tmp_path: Path) -> None:
    assert cpu_count(tmp_path, {}) == 8
    assert cpu_count(tmp_path, {"SLURM_CPUS_PER_TASK": "3"}) == 3
    assert cpu_count(tmp_path, {"SLURM_CPUS_PER_TASK": "64", "NSLOTS": ""}) == 8


GIB = 1 << 30


@pytest.mark.parametrize(
    ("lines", "limits", "gib"),
    [
        ("0::/", {}, None),
        ("0::/a/b", {"sys/fs/cgroup/a/b/memory.max": "max"}, None),
        ("0::/a/b", {"sys/fs/cgroup/a/b/memory.max": str(GIB)}, 1),
        ("0::/a/b", {"sys/fs/cgroup/a/memory.high": str(GIB // 2)}, 0.5),
        ("0::/gone", {"sys/fs/cgroup/memory.max": str(GIB)}, 1),  # a container shows its own root
        (V1, {"sys/fs/cgroup/memory/slurm/memory.limit_in_bytes": str(GIB)}, 1),
        (V1, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, None),
    ],
)
def test_memory_follows_the_control_group(
    lines: str, limits: dict[str, str], gib: float | None, tmp_path: Path
) -> None:
    machine = memory_limit(tmp_path)
    wanted = machine if gib is None else gib * GIB
    assert memory_limit(cgroups(tmp_path, lines, limits)) == wanted


def test_workers_end_with_a_main_process_that_is_killed() -> None:
    main = (
        "import concurrent.futures, multiprocessing, os, sys\n"
        "from karmma_pipeline.jobs import become_worker\n"
        "if __name__ == '__main__':\n"
        "    spawn = multiprocessing.get_context('spawn')\n"
        "    with concurrent.futures.ProcessPoolExecutor(1, spawn, become_worker) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        sys.stdin.readline()\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        sys.stdin.readline()\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", main], stdin=pipe, stdout=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        worker = psutil.Process(int(process.stdout.readline()))
        worker.send_signal(signal.SIGTERM)  # of the batch system, to all: the main one decides
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert int(process.stdout.readline()) == worker.pid  # it goes on working
        process.kill()
        _, alive = psutil.wait_procs([worker], timeout=PATIENCE_S)
        assert not alive


@pytest.mark.slow
def test_a_pool_that_ends_while_a_process_starts_leaves_it_no_lock_to_look_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = WorkerPool(1, become_worker, [Started(tmp_path / "started")])
    pool.schedule(blocked)
    wait_for((tmp_path / "started").exists)
    manager = pool._pool_manager.worker_manager
    (process,) = manager.workers.values()
    close, alive = manager.close_channels, list[bool]()

    def closing() -> None:
        alive.append(process.is_alive())
        close()  # type: ignore[no-untyped-call]

    monkeypatch.setattr(manager, "close_channels", closing)
    pool.stop()  # type: ignore[no-untyped-call]
    pool.join()
    assert alive == [False]
    # Ctrl-C reaches all processes of a terminal: one that is starting would say so at length.
    assert (tmp_path / "started").read_text().split() == [str(int(n)) for n in sorted(STOP_SIGNALS)]


@pytest.mark.slow
def test_a_process_of_a_pool_ignores_what_only_the_main_one_hears_of() -> None:
    with WorkerPool(1, become_worker) as pool:
        assert pool.schedule(blocked).result() == []
        heard = {signal.SIGXCPU}  # the kernel's limit of CPU time still ends it
        assert set(STOP_SIGNALS) - heard <= set(pool.schedule(ignored).result())
        assert signal.SIGXCPU not in pool.schedule(ignored).result()
    assert blocked() == []


@pytest.mark.slow
def test_a_signal_to_the_whole_job_leaves_pythons_tracker_of_semaphores_alive() -> None:
    """Killed, it is started again, and that one prints a traceback for each semaphore."""
    main = (
        "from multiprocessing import resource_tracker\n"
        "from karmma_pipeline.jobs import become_worker\n"
        "from karmma_pipeline.jobs.processes import WorkerPool\n"
        "if __name__ == '__main__':\n"
        "    with WorkerPool(1, become_worker):\n"
        "        tracker = resource_tracker._resource_tracker._pid\n"
        "        print(open(f'/proc/{tracker}/status').read())\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", main], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    (mask,) = [line.split()[1] for line in said.stdout.splitlines() if line.startswith("SigBlk")]
    survived = {n for n in STOP_SIGNALS if int(mask, 16) >> (n - 1) & 1}
    # Python ignores these two there, and lets them through.
    assert survived | {signal.SIGINT, signal.SIGTERM} == set(STOP_SIGNALS) | {signal.SIGINT}


@pytest.mark.slow
def test_a_script_that_starts_workers_is_not_run_again_in_each(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from karmma_pipeline.jobs import become_worker\n"
        "from karmma_pipeline.jobs.processes import WorkerPool\n"
        "print('run')\n"
        "with WorkerPool(1, become_worker) as pool:\n"
        "    assert pool.schedule(os.getpid).result() != os.getpid()\n"
    )
    said = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (said.returncode, said.stdout, said.stderr) == (0, "run\n", "")
