"""The text of batch scripts, and what bash makes of it."""

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.patience import PATIENCE_S, wait_for

from karmma_pipeline.batch.recipe import Container, Resources, Site
from karmma_pipeline.batch.slurm import BatchJob, batch_script

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
AGAIN = "At its time limit or if preempted, the job saves, is requeued and resumes."


def by_hand(stage: str, usage: str, hours: float, cpus: int, **more: Any) -> BatchJob:
    """A script of the top-level folders, which takes its arguments from the command line."""
    several = "%A_%a" if more.get("array") else "%j"
    return BatchJob(
        title=f"{usage}\n{AGAIN}",
        name=f"karmma-{stage}",
        arguments=more.pop("arguments", '"$@"'),
        resources=Resources(cpus=cpus, gpus=more.get("ranks") or 1, memory_gb=64, hours=hours),
        log=f"karmma-{stage}-{several}.log",
        **more,
    )


SHIPPED = {
    "extract/slurm.sbatch": by_hand(
        "extract",
        "sbatch --array=1-32 extract/slurm.sbatch RECIPE [--set A.B=VALUE ...]\n"
        "Each task extracts its part. Some tasks again: --array=3,7 --export=ALL,KARMMA_PARTS=32",
        hours=4,
        cpus=16,
        array="1-32",
        arguments='extract "$@"',
    ),
    "train/slurm.sbatch": by_hand(
        "train",
        "sbatch train/slurm.sbatch train-teacher|train-baseline|distill RECIPE [--set A.B=VALUE]",
        hours=12,
        cpus=8,
    ),
    "train/slurm_nodes.sbatch": by_hand(
        "train",
        "sbatch --nodes=2 train/slurm_nodes.sbatch train-teacher|train-baseline|distill RECIPE\n"
        "Four GPUs on each of some nodes, one rank per GPU.",
        hours=12,
        cpus=32,
        nodes=2,
        ranks=4,
    ),
    "evaluate/slurm.sbatch": by_hand(
        "evaluate",
        "sbatch evaluate/slurm.sbatch RUN... --store STORE --out REPORT",
        hours=1,
        cpus=8,
        arguments='evaluate "$@"',
    ),
}
NASTY = """it's "a" $HOME `x` \\ name"""
JOBS = {
    "array": (
        BatchJob(
            title="Stage extract: karmma extract 'my recipe.yaml'",
            name="epic.extract.0a1b2c",
            arguments="extract 'my recipe.yaml'",
            resources=Resources(cpus=16, gpus=1, memory_gb=64, hours=30.5),
            log='/scratch/a "b" c/100%%/extract.%A_%a.log',
            folder="/scratch/it's here",
            array="1-3,7%2",
            parts=32,
        ),
        Site(
            account="proj",
            partition="gpu",
            cpu_partition="cpu",
            qos="long",
            gpu_option="--gres=gpu:a100:{gpus}",
            sbatch=["--constraint=a100&nvme", "--mail-user=a@b.c"],
            env={"TORCH_HOME": "/scratch/my torch"},
            setup=["module load cuda", 'source "$HOME/env.sh"'],
            karmma="karmma",
            warning_s=300,
        ),
    ),
    "nodes_in_a_container": (
        BatchJob(
            title="Stage teacher: karmma train-teacher teacher.yaml",
            name="epic.teacher.0a1b2c",
            arguments="train-teacher teacher.yaml",
            resources=Resources(cpus=32, gpus=4, memory_gb=200, hours=12),
            log="/scratch/jobs here/logs/teacher.%j.log",
            folder="/scratch",
            nodes=2,
            ranks=4,
        ),
        Site(container=Container(image=Path("my images/karmma.sif"), binds=["/scratch"])),
    ),
    "without_gpu": (
        BatchJob(
            title="Joins.",
            name="n",
            arguments="store finalize s",
            resources=Resources(cpus=1, gpus=0, memory_gb=1.5, hours=1 / 60),
            log="n.log",
        ),
        Site(partition="gpu", cpu_partition="cpu", karmma="karmma"),
    ),
}


def check_same_text(path: Path, text: str) -> None:
    """Compare with a stored file; KARMMA_WRITE_GOLDEN=1 stores it anew."""
    if "KARMMA_WRITE_GOLDEN" in os.environ:
        path.write_text(text)
    assert text == path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)  # noqa: S607


@pytest.mark.parametrize("name", SHIPPED)
def test_the_scripts_of_the_top_level_folders_are_made_like_all_others(name: str) -> None:
    check_same_text(ROOT / name, batch_script(SHIPPED[name], Site(karmma="karmma")))


@pytest.mark.parametrize("name", JOBS)
def test_the_text_is_what_it_was(name: str) -> None:
    check_same_text(GOLDEN / f"{name}.sbatch", batch_script(*JOBS[name]))


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def started(folder: Path, script: str, state: str, **environment: str) -> "subprocess.Popen[str]":
    """Run a script among programs that stand in for Slurm's."""
    tools = folder / "bin"
    program(tools / "squeue", f"echo {state}")
    program(tools / "scontrol", 'if [ "$1" = show ]; then echo n1; else echo "scontrol $@"; fi')
    program(tools / "srun", 'while [[ "$1" == --* ]]; do shift; done; exec "$@"')
    program(tools / "torchrun", 'while [[ "$1" == --* ]]; do shift; done; "$@"')
    (folder / "job.sbatch").write_text(script)
    path = f"{tools}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1", "SLURM_NNODES": "1"}
    slurm["SLURM_JOB_NODELIST"] = "n1"
    return subprocess.Popen(
        ["bash", str(folder / "job.sbatch")],  # noqa: S607
        env={**os.environ, "PATH": path, **slurm, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def job(folder: Path, arguments: str = "x", ranks: int = 0) -> BatchJob:
    return BatchJob("", "n", arguments, Resources(gpus=0), f"{folder}/n.log", ranks=ranks)


@pytest.mark.parametrize(
    ("code", "state", "restarts", "again"),
    [
        (0, "RUNNING", 0, False),
        (1, "RUNNING", 0, False),
        (3, "RUNNING", 0, False),
        (75, "RUNNING", 50, True),
        (75, "CANCELLED", 0, False),  # somebody's scancel is the last word
        (138, "RUNNING", 50, True),  # told to stop before Python could listen
        (140, "RUNNING", 50, True),
        (152, "RUNNING", 50, True),
        (137, "RUNNING", 1, True),
        (137, "RUNNING", 2, False),  # killed three times: not by chance
    ],
)
def test_what_was_stopped_or_killed_goes_back_into_the_queue(
    code: int, state: str, restarts: int, again: bool, tmp_path: Path
) -> None:
    site = Site(karmma=str(program(tmp_path / "karmma", f"exit {code}")))
    text = batch_script(job(tmp_path), site)
    process = started(tmp_path, text, state, SLURM_RESTART_COUNT=str(restarts))
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert ("scontrol requeue 7" in out) == again
    assert process.returncode == (0 if again else code)


def test_array_tasks_are_requeued_one_by_one(tmp_path: Path) -> None:
    site = Site(karmma=str(program(tmp_path / "karmma", "exit 75")))
    task = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3"}
    array = replace(job(tmp_path), array="1-3")
    process = started(tmp_path, batch_script(array, site), "RUNNING", **task)
    assert process.communicate(timeout=PATIENCE_S)[0] == "scontrol requeue 40_3\n"


@pytest.mark.parametrize("array", ["", "1-3"])
def test_nothing_of_an_outer_job_reaches_the_command_or_the_queue(
    array: str, tmp_path: Path
) -> None:
    says = 'echo "${SLURM_ARRAY_TASK_ID-} ${KARMMA_PARTS-} ${SLURM_MEM_PER_CPU-} ${WORLD_SIZE-}'
    says += ' ${PBS_JOBID-} ${SGE_TASK_ID-} ${SLURM_STEP_NUM_TASKS-}."; exit 75'
    made = replace(job(tmp_path), array=array, parts=3 if array else 0)
    text = batch_script(made, Site(karmma=str(program(tmp_path / "karmma", says))))
    outer = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2", "SLURM_MEM_PER_CPU": "9"}
    outer |= {"KARMMA_PARTS": "8", "WORLD_SIZE": "2", "PBS_JOBID": "1", "SGE_TASK_ID": "4"}
    process = started(tmp_path, text, "RUNNING", SLURM_STEP_NUM_TASKS="2", **outer)
    out, _ = process.communicate(timeout=PATIENCE_S)
    kept, requeued = ("2 3", "40_2") if array else (" ", "7")
    assert out == f"{kept}     .\nscontrol requeue {requeued}\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("ranks", [0, 1])
def test_the_warning_reaches_the_command_which_saves(
    number: signal.Signals, ranks: int, tmp_path: Path
) -> None:
    text = f"trap 'touch {tmp_path}/saved; exit 75' USR1; touch {tmp_path}/up\n"
    site = Site(karmma=str(program(tmp_path / "karmma", text + "while :; do sleep 0.1; done")))
    if ranks:  # under torchrun the signal comes from srun, to agents (who ignore it) and ranks
        text = f"kill -USR1 $PPID; touch {tmp_path}/saved; exit 75"
        site = Site(karmma=str(program(tmp_path / "karmma", text)))
    process = started(tmp_path, batch_script(job(tmp_path, ranks=ranks), site), "RUNNING")
    if not ranks:
        wait_for((tmp_path / "up").exists)
        process.send_signal(number)
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert (tmp_path / "saved").exists()
    assert out == "scontrol requeue 7\n"
    assert not list(tmp_path.glob("stopped*"))


def test_a_rank_that_failed_is_a_failed_job(tmp_path: Path) -> None:
    site = Site(karmma=str(program(tmp_path / "karmma", "exit 4")))
    process = started(tmp_path, batch_script(job(tmp_path, ranks=1), site), "RUNNING")
    assert process.communicate(timeout=PATIENCE_S)[0] == ""
    assert process.returncode == 4


def test_any_name_arrives_as_it_is(tmp_path: Path) -> None:
    import shlex

    folder = tmp_path / NASTY
    folder.mkdir()
    site = Site(
        karmma=str(program(tmp_path / "karmma", 'pwd; printf "%s\\n" "$2" "$MINE"')),
        env={"MINE": NASTY},
    )
    made = BatchJob(
        "", "n", shlex.join(["x", NASTY]), Resources(gpus=0), f"{folder}/n.log", str(folder)
    )
    process = started(tmp_path, batch_script(made, site), "RUNNING")
    assert process.communicate(timeout=PATIENCE_S)[0].splitlines() == [str(folder), NASTY, NASTY]
