"""A chain launched again and again: on Slurm (stood in for; see tests/slurm too), and here."""

import os
import re
import sys
from pathlib import Path

import pytest
from batch.conftest import FakeSlurm, extract_recipe, write_chain
from click.testing import CliRunner, Result
from support.media_files import write_video
from support.tiny_store import write_store

from karmma_pipeline import config
from karmma_pipeline.batch import local
from karmma_pipeline.batch.chain import load_chain
from karmma_pipeline.cli import main
from karmma_pipeline.store import verify

ALL = "2, GPU-a, 5"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def submitted(slurm: FakeSlurm) -> list[tuple[str, str]]:
    """Scripts and their dependencies, in the order of submission."""
    calls = [call for call in slurm.jobs() if call.startswith("sbatch")]
    found = [re.search(r"(?:--dependency=(\S+) .*)?jobs/scripts/(.+)\.sbatch", c) for c in calls]
    return [(match[2], match[1] or "") for match in found if match]


def test_a_chain_is_submitted_once_with_its_dependencies(here: Path, slurm: FakeSlurm) -> None:
    write_chain()
    assert run("submit", "chain.yaml").exit_code == 0
    assert submitted(slurm) == [
        ("extract", ""),
        ("extract.finish", "afterany:101"),
        ("teacher", "afterok:102"),
        ("student", "afterok:102:103"),
        ("report", "afterok:102:103:104"),
    ]
    assert all("--kill-on-invalid-dep=yes" in c for c in slurm.jobs() if "dependency" in c)
    again = run("submit", "chain.yaml")
    assert len(slurm.jobs()) == 5
    assert "report: already queued as job 105" in again.output
    status = run("status", "chain.yaml").output
    assert re.search(r"extract +2 pending +not started", status)
    assert re.search(r"student +1 pending +epoch 0 of 2", status)


def test_a_launch_that_was_killed_is_completed(here: Path, slurm: FakeSlurm) -> None:
    write_chain()
    run("submit", "chain.yaml")
    slurm.queue.write_text("".join(slurm.queue.read_text().splitlines(keepends=True)[:1]))
    slurm.calls.write_text("sbatch\n" * 100)
    run("submit", "chain.yaml")
    assert submitted(slurm)[0] == ("extract.finish", "afterany:101")
    assert [name for name, _ in submitted(slurm)][1:] == ["teacher", "student", "report"]


def test_only_what_is_missing_is_submitted_again(here: Path, slurm: FakeSlurm) -> None:
    (here / "features").mkdir()
    config.save(extract_recipe(), here / "features/recipe.yaml")
    stores = [write_store(here / "features" / name) for name in ("teacher", "student")]
    (stores[0] / "commit/000001.safetensors").unlink()
    write_chain()
    slurm.queue.write_text("7|7|PENDING|t.teacher.xxxxxx\n8|8|PENDING|other\n")
    run("submit", "chain.yaml")
    script = Path("jobs/scripts/extract.sbatch").read_text()
    assert re.search(r"^#SBATCH --array=\d$", script, re.MULTILINE)
    assert "export KARMMA_PARTS=3" in script
    queued = slurm.queue.read_text()
    teacher = next(
        line for line in queued.splitlines() if "|t.teacher." in line and "xx" not in line
    )
    # the array is lost once more; what waits for it is replaced, not left to wait for ever
    slurm.queue.write_text(teacher + "\n")
    run("submit", "chain.yaml")
    assert f"scancel {teacher.split('|')[0]}" in slurm.jobs()
    assert [name for name, _ in submitted(slurm)].count("teacher") == 2


def test_a_dry_run_prints_the_scripts_and_does_nothing(here: Path, slurm: FakeSlurm) -> None:
    write_chain()
    before = set(here.rglob("*"))
    result = run("submit", "chain.yaml", "--dry-run")
    assert set(here.rglob("*")) == before
    assert slurm.jobs() == []
    run("submit", "chain.yaml")
    for name in ("extract", "extract.finish", "teacher", "student", "report"):
        assert Path(f"jobs/scripts/{name}.sbatch").read_text() in result.output
    assert "jobs/scripts/student.sbatch  (afterok extract, teacher)" in result.output


def test_slurm_that_refuses_is_one_sentence(here: Path, slurm: FakeSlurm) -> None:
    write_chain()
    sbatch = slurm.queue.parent / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'error: invalid account' >&2\nexit 1\n")
    result = run("submit", "chain.yaml")
    assert result.exit_code == 1
    assert "Error: sbatch: invalid account.\n" in result.output
    assert "Traceback" not in result.output


def test_slurms_commands_see_nothing_of_the_job_that_submits(
    here: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chain()
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_MEM_PER_CPU", "SQUEUE_FORMAT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    sbatch = slurm.queue.parent / "sbatch"
    sbatch.write_text(f"{sbatch.read_text()}\nenv > {here}/env\n")
    assert run("submit", "chain.yaml").exit_code == 0
    seen = dict(line.partition("=")[::2] for line in (here / "env").read_text().splitlines())
    assert seen["SBATCH_ACCOUNT"] == "mine"
    assert not [name for name in seen if name.startswith(("SLURM", "SQUEUE", "WORLD"))]


def test_parts_run_here_have_gpus_of_their_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(local, "cpu_count", lambda: 8)
    for gpus, wanted in ((1, ["2", "GPU-a", "5"]), (2, ["2, GPU-a"]), (0, [""] * 4), (9, [ALL])):
        stage = {"command": "extract", "recipe": "extract.yaml", "array": 4}
        stage["resources"] = {"gpus": gpus, "cpus": 1}
        _, (extract, *_) = load_chain(write_chain(extract=stage))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ALL)
        slots = list(local.slots(extract.settings.resources, 4, local.devices()))
        assert [", ".join(slot.devices or ()) for slot in slots] == wanted
        assert len({slot.cpus for slot in slots}) == len(slots)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        without = list(local.slots(extract.settings.resources, 4, local.devices()))
        assert [slot.devices for slot in without] == [None] * 4


def test_a_chain_run_here_looks_at_what_its_commands_have_left(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = write_chain(teacher=None, student=None, report=None)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setattr(sys, "executable", str(stand_in(here / "python", here / "env")))
    result = run("submit", str(chain), "--launcher", "local")
    assert result.exit_code == 1
    assert "extract: its commands exited with code 0, but the stage is not done" in result.output
    assert "nothing to do" not in result.output
    assert "SLURM_ARRAY_TASK_ID" not in (here / "env").read_text()


def stand_in(path: Path, said: Path) -> Path:
    """A program that tells its environment and does nothing, with success."""
    path.write_text(f"#!/bin/sh\nenv >> {said}\n")
    path.chmod(0o755)
    return path


def test_status_does_without_a_slurm_that_does_not_answer(here: Path, slurm: FakeSlurm) -> None:
    write_chain()
    said = [
        "squeue: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host",
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
    ]
    commands = "".join(f"echo '{line}' >&2\n" for line in said)
    (slurm.queue.parent / "squeue").write_text(f"#!/bin/sh\n{commands}exit 1\n")
    Path("jobs/logs").mkdir(parents=True)
    Path("jobs/logs/teacher.5.log").write_text("x\n 10%\rError: the disk is full.\n\n")
    result = run("status", "chain.yaml")
    assert result.exit_code == 0
    assert result.output.endswith(
        "\n(the queue could not be read: Slurm is not responding: slurm_load_jobs error: Unable to "
        "contact slurm controller (connect failure).)\n"
    )
    assert "teacher.5.log ends with: Error: the disk is full." in result.output


@pytest.mark.slow
def test_without_slurm_the_chain_runs_here_and_then_does_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_video(here / "clips/a.mp4", seconds=1)
    rows = "clip_id,video,start,stop,verb\na,a.mp4,0,1,x\nb,a.mp4,0,0.5,y\n"
    (here / "clips/m.csv").write_text(rows)
    chain = str(write_chain(array=2, teacher=None, student=None, report=None))
    first = run("submit", chain, "--launcher", "local")
    assert first.exit_code == 0, first.output
    assert verify(here / "features/student") == []
    assert {log.name for log in Path("jobs/logs").iterdir()} == {
        "extract.1.log",
        "extract.2.log",
        "extract.finish.log",
    }
    again = run("submit", chain, "--launcher", "local")
    assert "extract: done (2 of 2 shards)" in again.output
