"""What is in Slurm's queue and which processes its jobs have, and waiting for it to change."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

import psutil

KARMMA = [sys.executable, "-m", "karmma_pipeline.cli"]
PATIENCE_S = float(os.environ.get("KARMMA_TEST_PATIENCE_S", "900"))
STARTED = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:4.0f} s] {text}", flush=True)


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"FAILED: {what}")


def shell(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def queue() -> list[dict[str, str]]:
    fields = ("id", "array", "task", "state", "stage", "node")
    lines = shell("squeue", "-h", "-r", "-o", "%A|%F|%K|%T|%j|%N").splitlines()
    found = [dict(zip(fields, line.split("|"), strict=True)) for line in lines]
    for job in found:
        job["stage"] = job["stage"].partition(".")[2].rpartition(".")[0]  # pipeline.STAGE.digest
    return found


def jobs(stage: str) -> list[dict[str, str]]:
    return [job for job in queue() if job["stage"] == stage]


def running(array: str, task: int) -> dict[str, str] | None:
    found = [j for j in queue() if j["array"] == array and j["task"] == str(task)]
    return next((j for j in found if j["state"] == "RUNNING"), None)


def restarts(job: str) -> int:
    """Return how often Slurm has put a job (``7``, ``7_3``) back into the queue."""
    return int(fact(job, "Restarts") or 0)


def fact(job: str, name: str) -> str:
    """Return what Slurm says of a job, empty if nothing."""
    words = shell("scontrol", "show", "job", job).split()
    return next((w.partition("=")[2] for w in words if w.startswith(f"{name}=")), "")


def programs(**environment: str) -> list[psutil.Process]:
    """Return the running karmma commands that have these environment variables."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [])[1:3] != KARMMA[1:]:
            continue
        with suppress(psutil.Error):
            if environment.items() <= process.environ().items():
                found.append(process)
    return found


def program(array: str, task: int) -> psutil.Process | None:
    """Return the karmma command of an array task."""
    found = programs(SLURM_ARRAY_JOB_ID=array, SLURM_ARRAY_TASK_ID=str(task))
    return found[0] if found else None


def decoder(array: str, task: int) -> psutil.Process | None:
    """Return a decode process of an array task."""
    parent = program(array, task)
    with suppress(psutil.Error):
        children = parent.children() if parent else []
        return next((c for c in children if "--multiprocessing-fork" in c.cmdline()), None)
    return None


Deed = Generator[str | None, None, None]
"""Something done step by step: yields what it has done, or None while it waits."""


def until(look: Callable[[], Any]) -> Generator[None, None, Any]:
    while not (found := look()):
        yield None
    return found


def do_all(**deeds: Deed) -> None:
    """Let deeds go on side by side, each as soon as it can, until all are done."""
    deadline = time.monotonic() + PATIENCE_S
    while deeds:
        for name, deed in list(deeds.items()):
            try:
                done = next(deed)
            except StopIteration:
                del deeds[name]
            else:
                if done:
                    say(f"{name.replace('_', ' ')}: {done}")
        expect(time.monotonic() < deadline, f"waited {PATIENCE_S:.0f} s for {', '.join(deeds)}")
        time.sleep(0.2)


def wait_for(what: str, look: Callable[[], Any]) -> Any:
    found = []

    def deed() -> Deed:
        found.append((yield from until(look)))

    do_all(**{what: deed()})
    return found[0]
