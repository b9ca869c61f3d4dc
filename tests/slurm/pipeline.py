"""The whole pipeline on a real Slurm, disturbed in every way, against an undisturbed run.

    tests/slurm/run.sh [--install] [--quick] [FOLDER]

Starts a Slurm of three nodes on this machine, sends all stages from extraction (an array of 8) to
the report off as one chain, and then kills the launching process, a decoder, tasks, a node and
ranks, requeues a task, and warns others, one by its time limit. Some clips raise, crash or hang.
A second chain is submitted inside a task of an array that asked for memory per CPU. A sweep over
two methods and two seeds loses a run and is submitted again.
In the end store and weights must equal, byte for byte, those of the same recipes run here in
peace. Exits with 0 and says why where Slurm cannot run.

--install installs Slurm where it is missing (root, apt-get); --quick leaves out the loss of a
shard afterwards. Without FOLDER a temporary one is used, and removed if all went well.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from slurm.cluster import CannotRunError, Cluster, install, running
from slurm.scene import (
    PARTS,
    POISON,
    RUNS,
    TRAINING,
    WARNING_S,
    hold,
    is_held,
    karmma,
    prepare,
    prepare_inside,
    prepare_sweep,
    release,
    start_reference,
)
from slurm.watch import (
    KARMMA,
    Deed,
    decoder,
    do_all,
    expect,
    fact,
    jobs,
    program,
    programs,
    queue,
    restarts,
    say,
    shell,
    until,
    wait_for,
)
from slurm.watch import running as running_task

from karmma_pipeline.training.progress import HOW

TOLERANCE = 1e-3
"""How far the loss of two ranks may lie from that of one, relative: sums are in another order."""


def main() -> None:
    options = argparse.ArgumentParser(usage=__doc__)
    options.add_argument("--install", action="store_true")
    options.add_argument("--quick", action="store_true")
    options.add_argument("folder", type=Path, nargs="?")
    given = options.parse_args()
    folder = (given.folder or Path(tempfile.mkdtemp(prefix="karmma-slurm-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if given.install:
            install()
        with running(folder / "cluster") as cluster:
            run_road(cluster, folder, quick=given.quick)
    except CannotRunError as reason:
        say(f"SKIPPED: {reason}")
    except BaseException:
        say(f"everything is left in {folder}")
        raise
    else:
        say("everything holds")
    if given.folder is None:
        shutil.rmtree(folder)


def run_road(cluster: Cluster, folder: Path, *, quick: bool) -> None:
    reference, disturbed = prepare(folder)
    process = start_reference(reference)
    try:
        run_disturbed(cluster, disturbed)
        wait_for("the undisturbed run", lambda: process.poll() is not None)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    expect(process.returncode == 0, f"the undisturbed run failed; see {reference / 'out.txt'}")
    compare(reference, disturbed)
    check_exit_codes(disturbed)
    submit_from_inside(prepare_inside(folder))
    sweep_over_seeds(disturbed)
    if not quick:
        lose_a_shard(disturbed)
        compare(reference, disturbed)


def run_disturbed(cluster: Cluster, folder: Path) -> None:
    """Send the chain off and disturb it; return when the queue is empty and all is done."""
    shell("scontrol", "update", "PartitionName=debug", "State=DOWN")  # until all is laid out
    array = launch(folder)
    for name in ("extract-1", "extract-2", "decode-3", "extract-4", "extract-5"):
        hold(name)
    for training in ("teacher", "baseline", "two_nodes"):
        hold(training)
    shell("scontrol", "update", "PartitionName=debug", "State=UP")
    do_all(
        task_1=meet_the_time_limit(folder, array, 1),
        task_2=lose_the_node(cluster, array, 2),
        task_3=kill_decoder(array, 3),
        task_4=requeue(array, 4),
        task_5=kill_task(array, 5),
        teacher=warn_training(folder),
        baseline=kill_training(),
        two_nodes=disturb_two_nodes(folder),
        the_queue=run_empty(array),
    )
    print(karmma("status", "chain.yaml", cwd=folder).stdout)
    report = folder / "report/index.html"
    expect(report.is_file(), f"no report; see {folder / 'jobs/logs'}")


def launch(folder: Path) -> str:
    """Submit, kill that half-way, submit again; return the array."""
    command = [*KARMMA, "submit", "chain.yaml", "--site", "site.yaml"]
    launcher = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    wait_for("the first job in the queue", lambda: jobs("extract"))
    launcher.kill()
    launcher.wait()
    say(f"launching process killed with {len(queue())} tasks and jobs in the queue")
    array = jobs("extract")[0]["array"]
    again = submit(folder)
    expect(f"extract: already queued as job {array}" in again, "the array was submitted twice")
    expect(len(jobs("extract.finish")) == 1, "the joining job is not there just once")
    return array


def meet_the_time_limit(folder: Path, array: str, task: int) -> Deed:
    yield from until(lambda: is_held(f"extract-{task}"))
    hours, minutes, seconds = map(int, fact(f"{array}_{task}", "RunTime").split(":"))
    limit = hours * 60 + minutes + (seconds + WARNING_S) // 60 + 1  # minutes; in time to be warned
    shell("scontrol", "update", f"JobId={array}_{task}", f"TimeLimit={limit}")
    yield f"time limit cut to {limit} minutes"
    yield from until(lambda: restarts(f"{array}_{task}"))
    release(f"extract-{task}")
    shell("scontrol", "update", f"JobId={array}_{task}", "TimeLimit=30")
    log = folder / f"jobs/logs/extract.{array}_{task}.log"
    expect("stopped by SIGUSR1" in log.read_text(), f"{log} does not tell of a warning")
    yield "warned before its time limit, saved and waiting again"


def lose_the_node(cluster: Cluster, array: str, task: int) -> Deed:
    yield from until(lambda: is_held(f"extract-{task}"))
    victim = yield from until(lambda: running_task(array, task))
    cluster.kill_node(victim["node"], [victim["id"]])
    release(f"extract-{task}")
    yield f"node {victim['node']} taken down with it"
    yield from until(lambda: restarts(f"{array}_{task}"))
    cluster.start_node(victim["node"])
    yield f"missed and waiting again; node {victim['node']} back"


def kill_decoder(array: str, task: int) -> Deed:
    yield from until(lambda: is_held(f"decode-{task}"))
    victim = yield from until(lambda: decoder(array, task))
    victim.kill()
    release(f"decode-{task}")
    yield "decoder killed with -9"


def requeue(array: str, task: int) -> Deed:
    yield from until(lambda: is_held(f"extract-{task}"))
    shell("scontrol", "requeue", f"{array}_{task}")
    release(f"extract-{task}")
    yield "requeued"


def kill_task(array: str, task: int) -> Deed:
    yield from until(lambda: is_held(f"extract-{task}"))
    victim = yield from until(lambda: program(array, task))
    victim.kill()
    release(f"extract-{task}")
    yield "killed with -9"
    yield from until(lambda: restarts(f"{array}_{task}"))
    yield "waiting again"


def warn_training(folder: Path) -> Deed:
    yield from until(lambda: is_held("teacher"))
    job = jobs("teacher")[0]["id"]
    shell("scancel", "--batch", "--signal=USR1", job)
    yield "warned as before its time limit"
    yield from until(lambda: restarts(job))
    release("teacher")
    log = folder / f"jobs/logs/teacher.{job}.log"
    expect("stopped by SIGUSR1" in log.read_text(), f"{log} does not tell of a warning")
    yield "saved and waiting again"


def kill_training() -> Deed:
    yield from until(lambda: is_held("baseline"))
    job = jobs("baseline")[0]["id"]
    programs(SLURM_JOB_ID=job)[0].kill()
    yield "killed with -9"
    yield from until(lambda: restarts(job))
    release("baseline")
    yield "waiting again"


def disturb_two_nodes(folder: Path) -> Deed:
    """Kill one of two ranks, later warn the job as Slurm does: agents, ranks and all."""
    yield from until(lambda: is_held("two_nodes"))
    job, metrics = jobs("two_nodes")[0]["id"], folder / "runs/two_nodes/metrics.jsonl"
    yield from until(lambda: epochs(metrics))
    programs(SLURM_JOB_ID=job, RANK="1")[0].kill()
    before = epochs(metrics)
    yield f"rank 1 killed with -9 after {before} epochs"
    yield from until(lambda: epochs(metrics) > before)
    expect(restarts(job) == 0, "torchrun has not replaced the rank by itself")
    shell("scancel", "--signal=USR1", job)
    yield "both ranks started again by torchrun and gone on; now warned"
    yield from until(lambda: restarts(job))
    release("two_nodes")
    (log,) = (folder / "jobs/logs").glob(f"two_nodes.{job}.log")
    expect("stopped by SIGUSR1" in log.read_text(), f"{log} does not tell of a warning")
    yield "saved and waiting again"


def run_empty(array: str) -> Deed:
    yield from until(lambda: not queue())
    counts = [restarts(f"{array}_{task}") for task in range(1, PARTS + 1)]
    expect(all(counts[task - 1] for task in (1, 2, 4, 5)), f"restarts of tasks: {counts}")
    yield f"empty; restarts of tasks: {counts}"


def epochs(metrics: Path) -> int:
    return len(metrics.read_text().splitlines()) if metrics.is_file() else 0


def compare(reference: Path, disturbed: Path) -> None:
    """See that stores and weights are the same bytes and that the poisoned clips are named."""
    compared = 0
    for top in ("features/teacher", "features/student", *(f"runs/{r}" for r in RUNS)):
        ours, theirs = (stored(root / top) for root in (disturbed, reference))
        expect(bool(ours) and set(ours) == set(theirs), f"{top}: {set(ours) ^ set(theirs)}")
        for path, data in ours.items():
            expect(data == theirs[path], f"{top}/{path} differs from the undisturbed run's")
        compared += len(ours)
    say(f"{compared} files of stores and weights equal the undisturbed run's, byte for byte")
    one, two = (losses(disturbed / f"runs/{name}/metrics.jsonl") for name in ("teacher", RUNS[-1]))
    away = max(abs(a - b) / max(a, 1e-3) for a, b in zip(one, two, strict=True))
    expect(away < TOLERANCE, f"two ranks end {away:.3%} away from one")
    say(f"two ranks: every epoch's loss within {away:.4%} of one process's")
    with (disturbed / "features/failures.csv").open(newline="") as file:
        reasons = {(row["clip_id"], row["reason"]) for row in csv.DictReader(file)}
    found = {pair for pair in reasons if pair[1] != "no_stream"}
    expect(found == set(POISON.items()), f"failures.csv says {sorted(found)}")
    say(f"poisoned clips named: {sorted(found)}; all others are in the store once")


def stored(root: Path) -> dict[str, bytes]:
    """Return the bytes of a store, or of the weights and metrics of a run, by path.

    Of metrics, how fast and on what they came about is left out: an interruption changes it.
    """
    is_run = root.parent.name == "runs"
    files = [*root.rglob("*.safetensors"), root / "metrics.jsonl"] if is_run else root.rglob("*")
    return {
        str(path.relative_to(root)): _lasting(path)
        for path in sorted(files)
        if path.is_file() and not path.name.endswith(".tmp")
    }


def _lasting(path: Path) -> bytes:
    if path.name != "metrics.jsonl":
        return path.read_bytes()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return json.dumps([{k: v for k, v in row.items() if k not in HOW} for row in rows]).encode()


def losses(metrics: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in metrics.read_text().splitlines()]


def check_exit_codes(folder: Path) -> None:
    strict = karmma("extract", "recipes/extract.yaml", "--set", "max_failures=0.01", cwd=folder)
    expect(strict.returncode == 3, f"too many failures: exit code {strict.returncode}")
    done = karmma("extract", "recipes/extract.yaml", cwd=folder)
    expect(done.returncode == 0, f"nothing to do: exit code {done.returncode}")
    say("exit codes: 3 with a stricter max_failures, 0 without")


def submit_from_inside(folder: Path) -> None:
    """Submit inside a task of an array that asked for memory per CPU: nothing of it may matter."""
    for name in ("outer", "inside"):
        hold(name)
    options = ["--array=1-3", "--mem-per-cpu=200M", "--output=outer.%a.log", f"--chdir={folder}"]
    array = shell("sbatch", "--parsable", *options, str(folder / "outer.sh"))
    wait_for("a training submitted from inside a job", lambda: is_held("inside"))
    shards = list((folder / "features/teacher/commit").iterdir())
    expect(
        len(shards) == 3, f"{len(shards)} of 3 shards: it took the outer task's part for its own"
    )
    job = jobs("inside")[0]["id"]
    shell("scancel", "--signal=USR1", job)
    wait_for("its way back into the queue", lambda: restarts(job))
    expect(restarts(f"{array}_2") == 0, "the task that submitted it was requeued instead")
    for name in ("inside", "outer"):
        release(name)
    wait_for("the end of what was submitted from inside a job", lambda: not queue())
    done = epochs(folder / "runs/inside/metrics.jsonl")
    said = (folder / "outer.2.log").read_text()
    expect(done == TRAINING["epochs"], f"{done} epochs; {folder}/jobs/logs; {said}")
    say("submitted from inside an array's task with memory per CPU: all shards, all epochs")


def sweep_over_seeds(folder: Path) -> None:
    """Send a sweep off, cancel one of its runs, and send it off again: just that one is made."""
    prepare_sweep(folder)
    shell("scontrol", "update", "PartitionName=debug", "State=DOWN")  # until a run is cancelled
    send_sweep(folder)
    tasks = {stage: len(jobs(stage)) for stage in ("runs1", "runs2", "report")}
    expect(tasks == {"runs1": 2, "runs2": 2, "report": 1}, f"in the queue: {tasks}")
    shell("scancel", f"{jobs('runs2')[0]['array']}_2")
    shell("scontrol", "update", "PartitionName=debug", "State=UP")
    wait_for("the end of a sweep that lost a run", lambda: not queue())
    status = karmma("sweep", "sweep.yaml", "--status", cwd=folder).stdout
    expect("student  1 of 2 runs done; seed1: epoch 0 of 2" in status, status)
    expect(not (folder / "sweep/report/index.html").is_file(), "a report without one of its runs")
    before = weights(folder / "sweep/teacher/seed1")
    again = send_sweep(folder)
    expect(again.count("submitted") == 2 and "runs1" not in again, again)
    wait_for("the lost run and the report", lambda: not queue())
    expect("nothing to do" in send_sweep(folder), "the sweep is not done again")
    results = json.loads((folder / "sweep/report/results.json").read_text())
    seeds = [method["seeds"] for method in results["methods"]]
    expect(seeds == [[0, 1], [0, 1]], f"the report has seeds {seeds}")
    expect(weights(folder / "sweep/teacher/seed1") == before, "a run that was done changed")
    for name in ("teacher/seed1", "student/seed1"):
        here = karmma("sweep", "sweep.yaml", "--set", "out=here", "--run", name, cwd=folder)
        expect(here.returncode == 0, here.stderr)
        ours, theirs = (weights(folder / out / name) for out in ("sweep", "here"))
        expect(ours == theirs, f"{name} has other weights than without Slurm")
    say("a sweep of 2 methods and 2 seeds: a cancelled run made again, one report, same weights")


def send_sweep(folder: Path) -> str:
    done = karmma("sweep", "sweep.yaml", "--slurm", "--site", "site.yaml", cwd=folder)
    expect(done.returncode == 0, done.stderr)
    print(done.stdout.rstrip(), flush=True)
    return done.stdout


def weights(run: Path) -> dict[str, bytes]:
    return {name: (run / name / "model.safetensors").read_bytes() for name in ("best", "last")}


def lose_a_shard(folder: Path) -> None:
    """Lose a shard; the commands must say so, and a launch must make just that one again."""
    store = folder / "features/teacher"
    (store / "commit/000005.safetensors").unlink()
    (store / "manifest.json").unlink()
    refused = karmma("store", "finalize", "features/teacher", "--parts", str(PARTS), cwd=folder)
    expect(refused.returncode == 1, f"a shard is missing: exit code {refused.returncode}")
    expect("--part " in refused.stderr, refused.stderr)
    say(refused.stderr.strip())
    said = submit(folder)
    expect("teacher: done" in said and said.count("submitted") == 2, said)
    job = wait_for("its task", lambda: jobs("extract"))[0]
    wait_for("its task at work", lambda: program(job["array"], int(job["task"])))
    shell("scancel", job["array"])
    wait_for("an empty queue", lambda: not queue())
    expect(not (store / "commit/000005.safetensors").is_file(), "a cancelled task came back")
    say("its task was cancelled and stayed so; launched once more")
    submit(folder)
    wait_for("the lost shard", lambda: not queue())
    expect("nothing to do" in submit(folder), "the chain is not done again")


def submit(folder: Path) -> str:
    done = karmma("submit", "chain.yaml", "--site", "site.yaml", cwd=folder)
    expect(done.returncode == 0, done.stderr)
    print(done.stdout.rstrip(), flush=True)
    return done.stdout


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that Slurm is stopped then, too
    main()
