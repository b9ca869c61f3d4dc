"""The whole road on a real Slurm, disturbed in every way, against an undisturbed run.

    tests/slurm/run.sh [FOLDER]

Installs Slurm where it can (root, apt-get), starts three nodes on this machine, sends the road
from extraction (an array of 8) to the report off as one chain, and then: kills the launching
process, requeues a task, lets one meet its time limit, kills a decoder, a task and a node, and
warns a training. Some clips raise, crash or hang. In the end store and weights must equal, byte
for byte, those of the same chain run here in peace. Takes some minutes; exits with 0 and says
why where Slurm cannot run.
"""

import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml
from slurm import nodes
from slurm.cluster import CannotRunError, Cluster, running

HERE = Path(__file__).parent
KARMMA = [sys.executable, "-m", "karmma_pipeline.cli"]
PARTS = 8
WARNING_S = 20
PATIENCE_S = 1800.0
STARTED = time.monotonic()

POISON = {
    "poison_raise": "decode_error",
    "poison_crash": "crashed",
    "poison_hang": "timeout",
}
RESOURCES = {"cpus": 2, "gpus": 0, "memory_gb": 4, "hours": 0.5}
SIZE = {"dim": 32, "layers": 1, "attention_heads": 4, "ffn_width": 32, "head_width": 64}
TRAINING = {"epochs": 3, "batch_size": 16, "size": SIZE, "optimiser": {"lr": 1e-3}}
RUNS = ("teacher", "baseline", "student")
RECIPES: dict[str, dict[str, Any]] = {
    "extract": {
        "manifest": "../clips/manifest.csv",
        "out": "features",
        "flow": {"bound_px": 4},
        "audio": {"sample_rate": 16000, "n_fft": 512, "win_length": 400, "mels": 32},
        "sets": {
            "teacher": {
                "rgb": {"name": "s3d", "weights": "random:0", "frames": 8, "size": 48},
                "flow": {"name": "s3d", "weights": "random:1", "frames": 8, "size": 48},
                "audio": {"name": "resnet18", "weights": "random:2", "image": [32, 64]},
            },
            "student": {
                "rgb": {"name": "s3d", "weights": "random:0", "frames": 8, "size": 32},
                "audio": {"name": "resnet18", "weights": "random:2", "image": [32, 32]},
            },
        },
        "store": {"clips_per_shard": 4},
        "decode": {"workers": 1, "timeout_s": 45},
        "batch_size": 2,
    },
    "teacher": {**TRAINING, "store": "features/teacher", "out": "runs/teacher"},
    "baseline": {**TRAINING, "store": "features/student", "out": "runs/baseline"},
    "student": {
        **TRAINING,
        "store": "features/student",
        "out": "runs/student",
        "teacher": "runs/teacher",
        "teacher_store": "features/teacher",
    },
    "report": {
        "runs": [f"runs/{name}" for name in RUNS],
        "stores": ["features/teacher", "features/student"],
        "out": "report",
        "draws": 2,
    },
}
COMMANDS = {
    "extract": "extract",
    "teacher": "train-teacher",
    "baseline": "train-baseline",
    "student": "distill",
    "report": "evaluate",
}


def main() -> None:
    given = Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else None
    folder = given or Path(tempfile.mkdtemp(prefix="karmma-slurm-"))
    prepare(folder)
    try:
        with running(folder / "cluster") as cluster:
            reference = start_reference(folder / "reference")
            try:
                disturbed = folder / "a cluster"  # a name with a space
                run_disturbed(cluster, disturbed)
                say("waiting for the undisturbed run")
                expect(reference.wait(PATIENCE_S) == 0, "the undisturbed run failed")
            finally:
                reference.kill()
            compare(folder / "reference", disturbed)
            check_exit_codes(disturbed)
            lose_a_shard(disturbed)
            compare(folder / "reference", disturbed)
            train_on_two_nodes(disturbed)
    except CannotRunError as reason:
        say(f"SKIPPED: {reason}")
        return
    say("everything holds")
    if given is None:
        shutil.rmtree(folder)


def prepare(folder: Path) -> None:
    """Write clips, three of them poisoned, and the same recipes for both runs."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "faults"), str(HERE.parents[1])])
    run("sample", str(folder / "clips"), "--clips", "64")
    manifest = folder / "clips/manifest.csv"
    with manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    good = manifest.parent / rows[0]["video"]
    (good.parent / "page.mp4").write_text("<html>")
    for number, clip_id in enumerate(POISON):
        video = "videos/page.mp4" if clip_id == "poison_raise" else f"videos/{clip_id}.mp4"
        if clip_id != "poison_raise":
            shutil.copy(good, manifest.parent / video)
        rows.insert(7 + 21 * number, {**rows[0], "clip_id": clip_id, "video": video})
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for name, array in (("reference", 1), ("a cluster", PARTS)):
        for recipe, tree in RECIPES.items():
            write_yaml(folder / name / f"recipes/{recipe}.yaml", tree)
        stages: dict[str, Any] = {
            stage: {"command": c, "recipe": f"recipes/{stage}.yaml", "resources": RESOURCES}
            for stage, c in COMMANDS.items()
        }
        stages["extract"]["array"] = array
        write_yaml(folder / name / "chain.yaml", {"name": "road", "stages": stages})
        site = {"env": {"OMP_NUM_THREADS": "1"}, "warning_s": WARNING_S}
        write_yaml(folder / name / "site.yaml", site)


def start_reference(folder: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "KARMMA_TEST_DECODE_S": "0"}
    command = [*KARMMA, "submit", "chain.yaml", "--site", "site.yaml", "--launcher", "local"]
    with (folder / "out.txt").open("wb") as out:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)


def run_disturbed(cluster: Cluster, folder: Path) -> None:
    """Send the chain off and disturb it; return when the queue is empty and all is done."""
    os.environ["KARMMA_TEST_DECODE_S"] = "1"
    command = [*KARMMA, "submit", "chain.yaml", "--site", "site.yaml"]
    launcher = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    wait_for("the first job in the queue", lambda: jobs("extract"))
    launcher.kill()
    launcher.wait()
    say(f"launching process killed with {len(queue())} tasks and jobs in the queue")
    array = jobs("extract")[0]["array"]
    again = submit(folder)
    expect(f"extract: in the queue as job {array}" in again, "the array was submitted twice")
    expect(len(jobs("extract.finish")) == 1, "the joining job is not there just once")

    worker = wait_for("a decoder of task 2", lambda: decoder(array, 2))
    worker.kill()
    say("task 2: decoder killed with -9")
    wait_for("a decoder of task 1", lambda: decoder(array, 1))
    shell("scontrol", "requeue", f"{array}_1")
    say("task 1: requeued")
    wait_for("a decoder of task 3", lambda: decoder(array, 3))
    limit = (seconds_run(array, 3) + 2 * WARNING_S) // 60 + 1  # in time to be warned
    shell("scontrol", "update", f"JobId={array}_3", f"TimeLimit={limit}")
    say(f"task 3: time limit cut to {limit} minutes")
    task = wait_for("a decoder of task 4", lambda: decoder(array, 4) and program(array, 4))
    task.kill()
    say("task 4: killed with -9")
    victim = wait_for("task 5 at work", lambda: decoder(array, 5) and running_task(array, 5))
    cluster.kill_node(victim["node"], [victim["id"]])
    say(f"node {victim['node']} taken down with task 5")
    wait_for("task 3 stopped and waiting again", lambda: restarts(array, 3) > 0)
    say("task 3: warned, saved and waiting again")
    shell("scontrol", "update", f"JobId={array}_3", "TimeLimit=30")
    wait_for("Slurm to miss the node", lambda: restarts(array, 5) > 0)
    cluster.start_node(victim["node"])
    say(f"node {victim['node']} back")
    teacher = wait_for("the teacher's training", lambda: program(jobs("teacher")[0]["id"]))
    time.sleep(5)
    shell("scancel", "--batch", "--signal=USR1", teacher.environ()["SLURM_JOB_ID"])
    say("teacher: warned as before its time limit")
    wait_for("an empty queue", lambda: not queue())
    for task_number in range(1, PARTS + 1):
        say(f"task {task_number}: restarted {restarts(array, task_number)} times")
    print(run("status", "chain.yaml", cwd=folder).stdout)
    report = folder / "report/index.html"
    expect(report.is_file(), f"no report; see {folder / 'jobs/logs'}")


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
    with (disturbed / "features/failures.csv").open(newline="") as file:
        reasons = {(row["clip_id"], row["reason"]) for row in csv.DictReader(file)}
    found = {pair for pair in reasons if pair[1] != "no_stream"}
    expect(found == set(POISON.items()), f"failures.csv says {sorted(found)}")
    say(f"poisoned clips named: {sorted(found)}; all others are in the store once")


def stored(root: Path) -> dict[str, bytes]:
    """Return the bytes of a store, or of the weights of a run, by path."""
    files = root.rglob("*.safetensors" if root.parent.name == "runs" else "*")
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(files)
        if path.is_file() and not path.name.endswith(".tmp")
    }


def check_exit_codes(folder: Path) -> None:
    strict = run("extract", "recipes/extract.yaml", "--set", "max_failures=0.01", cwd=folder)
    expect(strict.returncode == 3, f"too many failures: exit code {strict.returncode}")
    done = run("extract", "recipes/extract.yaml", cwd=folder)
    expect(done.returncode == 0, f"nothing to do: exit code {done.returncode}")
    say("exit codes: 3 with a stricter max_failures, 0 without")


def lose_a_shard(folder: Path) -> None:
    """Lose a shard; the commands must say so, and a launch must make just that one again."""
    store = folder / "features/teacher"
    (store / "commit/000005.safetensors").unlink()
    (store / "manifest.json").unlink()
    refused = run("store", "finalize", "features/teacher", "--parts", str(PARTS), cwd=folder)
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
    expect("everything is done" in submit(folder), "the chain is not done again")


def train_on_two_nodes(folder: Path) -> None:
    """Train with a rank on each of two nodes, kill one, warn them, compare with one process."""
    if not nodes.is_built():
        say("training on two nodes: skipped, this version trains in one process")
        return
    for name in ("one", "two"):
        recipe = nodes.recipe(TRAINING, f"runs/{name}")
        write_yaml(folder / f"recipes/{name}.yaml", recipe)
    write_yaml(folder / "nodes.yaml", nodes.chain(RESOURCES))
    submit(folder, "nodes.yaml")
    job_id = next(job["id"] for job in queue() if job["name"].startswith("nodes.two."))
    found = nodes.disturb(job_id, wait_for, shell, folder / "runs/two")
    say(f"two nodes: a rank killed and replaced, warned, requeued {found['Restarts']} times")
    wait_for("both trainings", lambda: not queue())
    print(run("status", "nodes.yaml", cwd=folder).stdout)
    away = nodes.difference(folder / "runs/one", folder / "runs/two")
    expect(away < nodes.TOLERANCE, f"two ranks end {away:.1%} away from one")
    say(f"two ranks: every epoch's loss within {away:.2%} of one process's")


def submit(folder: Path, chain: str = "chain.yaml") -> str:
    done = run("submit", chain, "--site", "site.yaml", cwd=folder)
    expect(done.returncode == 0, done.stderr)
    print(done.stdout.rstrip(), flush=True)
    return done.stdout


def queue() -> list[dict[str, str]]:
    fields = ("id", "array", "task", "state", "name", "node")
    lines = shell("squeue", "-h", "-r", "-o", "%A|%F|%K|%T|%j|%N").splitlines()
    return [dict(zip(fields, line.split("|"), strict=True)) for line in lines]


def jobs(stage: str) -> list[dict[str, str]]:
    return [job for job in queue() if job["name"].rpartition(".")[0] == f"road.{stage}"]


def running_task(array: str, task: int) -> dict[str, str] | None:
    found = [j for j in queue() if j["array"] == array and j["task"] == str(task)]
    return next((j for j in found if j["state"] == "RUNNING"), None)


def restarts(array: str, task: int) -> int:
    return int(fact(array, task, "Restarts") or 0)


def seconds_run(array: str, task: int) -> int:
    hours, minutes, seconds = fact(array, task, "RunTime").split(":")
    return 3600 * int(hours) + 60 * int(minutes) + int(seconds)


def fact(array: str, task: int, name: str) -> str:
    words = shell("scontrol", "show", "job", f"{array}_{task}").split()
    return next((w.split("=")[1] for w in words if w.startswith(f"{name}=")), "")


def program(array: str, task: int | None = None) -> psutil.Process | None:
    """Return the karmma process of a job or an array task."""
    name = "SLURM_JOB_ID" if task is None else "SLURM_ARRAY_JOB_ID"
    for process in psutil.process_iter(["cmdline"]):
        try:
            environment, words = process.environ(), process.info["cmdline"] or []
        except psutil.Error:
            continue
        mine = task is None or environment.get("SLURM_ARRAY_TASK_ID") == str(task)
        if environment.get(name) == array and mine and words[1:3] == KARMMA[1:]:
            return process
    return None


def decoder(array: str, task: int) -> psutil.Process | None:
    """Return a decode process of an array task."""
    parent = program(array, task)
    try:
        children = parent.children() if parent else []
        return next((c for c in children if "--multiprocessing-fork" in c.cmdline()), None)
    except psutil.Error:
        return None


def wait_for(what: str, look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            found = look()
        except (IndexError, psutil.Error):
            found = None
        if found:
            return found
        time.sleep(0.2)
    raise SystemExit(f"FAILED: waited {PATIENCE_S:.0f} s for {what}")


def run(*arguments: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*KARMMA, *arguments], cwd=cwd, capture_output=True, text=True)


def shell(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def write_yaml(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"FAILED: {what}")


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:4.0f} s] {text}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that Slurm is stopped then, too
    main()
