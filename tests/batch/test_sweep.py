"""Sweeps: what a change redoes, what failures leave, and what Slurm is handed."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from batch.conftest import FakeSlurm
from click.testing import CliRunner, Result
from support.forks import in_fork
from support.here_pool import HerePool
from support.nth_call import kill_at_call
from support.patience import PATIENCE_S, wait_for
from support.tiny_store import write_store
from support.training import SIZE, results

from karmma_pipeline import config
from karmma_pipeline.batch import local, sweep_launch
from karmma_pipeline.batch.local import LocalCommand
from karmma_pipeline.batch.recipe import Resources, Site
from karmma_pipeline.batch.sweep import LoadedSweep, load_sweep, run_one
from karmma_pipeline.cli import main
from karmma_pipeline.errors import ConfigError, KarmmaError, TooManyFailuresError
from karmma_pipeline.evaluation import results as schema
from karmma_pipeline.evaluation.report import classes, figures
from karmma_pipeline.extraction.decode import pool
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.training.recipe import DistillRecipe, TrainRecipe

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
TRAINED: dict[str, Any] = {"size": SIZE, "epochs": 1, "batch_size": 32, "out": "x"}
METHODS: dict[str, Any] = {
    "teacher": {"command": "train-teacher", "recipe": "teacher.yaml"},
    "baseline": {
        "command": "train-baseline",
        "recipe": "baseline.yaml",
        "set": {"size.absent": "zeros"},
    },
    "student": {
        "command": "distill",
        "recipe": "student.yaml",
        "teacher": "teacher",
        "grid": {"alpha": [0.3, 0.5]},
    },
}


def write_sweep(seeds: Sequence[int] = (0, 1), **changes: Any) -> Path:
    """Write a sweep and its recipes into the current folder; changes are of methods."""
    for name, keys in {
        "teacher": {"store": "features/teacher", "name": "Teacher"},
        "baseline": {"store": "features/student"},
        "student": {"store": "features/student", "teacher": "y", "teacher_store": "z"},
    }.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump({**TRAINED, **keys}))
    methods = {n: m for n, m in {**METHODS, **changes}.items() if m}
    tree: dict[str, Any] = {
        "out": "sw",
        "methods": methods,
        "seeds": [*seeds],
        "evaluate": {"set": {"costs": False, "draws": 0, "drop_rates": [0.0, 0.5]}},
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return Path("sweep.yaml")


@pytest.fixture
def stores(here: Path) -> Path:
    """The current folder, with two stores."""
    for name in ("teacher", "student"):
        write_store(here / "features" / name)
    return here


def in_this_process(
    commands: Sequence[LocalCommand],
    resources: Resources,
    most: int,
    site: Site,
    stop: StopFlag,
    ended: Callable[[LocalCommand, int], None],
) -> set[str]:
    """As `local.run_all`, one after the other and without new processes."""
    done = set[str]()
    for command in commands:
        if not command.after <= done:
            continue
        code = 0
        try:
            run_one(load_sweep(Path(command.words[1])), command.words[-1], stop)
            done.add(command.name)
        except KarmmaError as error:
            command.log.parent.mkdir(parents=True, exist_ok=True)
            command.log.write_text(f"Error: {error}\n")
            code = error.exit_code
        ended(command, code)
    return done


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "run_all", in_this_process)
    for module in (figures, classes):  # most of a report's time
        monkeypatch.setattr(module, "draw", lambda _: {})


def launch(path: Path) -> list[str]:
    """Run a sweep here; return the stages that were not done before."""
    said: list[str] = []
    sweep_launch.run_locally(load_sweep(path), None, Site(), StopFlag(), said.append)
    return [line.partition(":")[0] for line in said[1:-1]]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_a_sweep_is_runs_of_every_method_setting_and_seed(here: Path) -> None:
    grid = {"alpha": [0.3, 0.5], "optimiser.lr": [1e-3]}
    sweep = load_sweep(write_sweep(student={**METHODS["student"], "grid": grid}))
    assert [stage.name for stage in sweep.stages] == [
        *("teacher/seed0", "teacher/seed1", "baseline/seed0", "baseline/seed1"),
        *(f"student,alpha={a},lr=0.001/seed{s}" for a in (0.3, 0.5) for s in (0, 1)),
        "report",
    ]
    student = sweep.stage("student,alpha=0.5,lr=0.001/seed1")
    assert student.waits == ("teacher/seed1",)
    recipe: Any = student.recipe
    assert isinstance(recipe, DistillRecipe)
    assert (recipe.alpha, recipe.optimiser.lr, recipe.seed) == (0.5, 1e-3, 1)
    assert recipe.teacher == (Path("sw/teacher/seed1"),)
    assert recipe.teacher_store == ((Path("features/teacher"),),)
    report: Any = sweep.stages[-1].recipe
    assert report.stores == [Path("features/teacher"), Path("features/student")]
    names = dict.fromkeys(report.names.values())
    assert [*names] == [
        *("Teacher", "baseline", "student, alpha=0.3, lr=0.001", "student, alpha=0.5, lr=0.001")
    ]


def test_methods_on_one_recipe_are_told_apart_in_the_report(here: Path) -> None:
    path = write_sweep(
        student=None, weak=METHODS["teacher"], wide={**METHODS["teacher"], "name": "Wide"}
    )
    report: Any = load_sweep(path).stages[-1].recipe
    names = [*dict.fromkeys(report.names.values())]
    assert names == ["Teacher", "baseline", "weak", "Wide"]
    grids = [{**METHODS["teacher"], "grid": {key: [2]}} for key in ("epochs", "batch_size")]
    path = write_sweep(student=None, teacher=grids[0], weak=grids[1])
    report = load_sweep(path).stages[-1].recipe
    assert {*report.names.values()} == {"Teacher, epochs=2", "Teacher, batch_size=2", "baseline"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {**METHODS["student"], "teacher": "tutor"}},
         "no method of this name is defined before it; defined: teacher, baseline"),
        ({"student": {**METHODS["student"], "teacher": []}}, "distill needs at least one"),
        ({"baseline": {**METHODS["baseline"], "teacher": "teacher"}}, "only for distill"),
        ({"baseline": {**METHODS["baseline"], "set": {"seed": 3}}}, "seed is set by the sweep"),
        ({"baseline": {**METHODS["baseline"], "set": {"epohs": 3}}}, "did you mean 'epochs'"),
        ({"baseline": {**METHODS["baseline"], "grid": {"epochs": [3, 3]}}}, "3 is listed twice"),
        ({"baseline": {**METHODS["baseline"], "grid": {"exclude": ["a/b", "a_b"]}}},
         "two combinations would have the name baseline,exclude=a_b"),
        ({"seeds": [1, 1]}, "1 is listed twice"),
        ({"baseline": {**METHODS["baseline"], "set": {"name": "B"}}},
         "set the method's own key name instead"),
        ({"baseline": {**METHODS["baseline"], "name": "Teacher"}},
         "methods.baseline: another method is named 'Teacher'"),
    ],
)  # fmt: skip
def test_what_a_sweep_cannot_mean_is_said(
    here: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_sweep(**changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_sweep(path)


@pytest.mark.slow
def test_again_does_nothing_and_a_change_redoes_what_depends_on_it(
    stores: Path, quick: None
) -> None:
    path = write_sweep(seeds=[3])
    assert len(launch(path)) == 5
    assert len(list(Path("sw/teacher_logits").iterdir())) == 1  # two students, one teacher
    assert launch(path) == []
    # a name and a place change nothing; another setting is one more method, and another report
    more = {**METHODS["student"], "name": "KARMMA", "grid": {"alpha": [0.3, 0.5, 0.9]}}
    assert launch(write_sweep(seeds=[3], student=more)) == ["student,alpha=0.9/seed3", "report"]
    before = results(Path("sw/teacher/seed3"))
    changed = {**METHODS["teacher"], "set": {"label_smoothing": 0.1}}
    again = launch(write_sweep(seeds=[3], teacher=changed))
    students = ["student,alpha=0.3/seed3", "student,alpha=0.5/seed3"]
    assert again == ["teacher/seed3", *students, "report"]
    assert results(Path("sw/superseded/teacher/seed3.1")) == before
    # the student that was left out has learned from the teacher that is gone
    again = launch(write_sweep(seeds=[3], teacher=changed, student=more))
    assert again == ["student,alpha=0.9/seed3", "report"]
    assert Path("sw/superseded/student,alpha=0.9/seed3.1/best").is_dir()
    runs = schema.read(Path("sw/report/results.json")).runs
    assert [(run.name, run.seed) for run in runs][-1] == ("KARMMA, alpha=0.9", 3)


def test_runs_that_fail_are_named_and_end_no_others(stores: Path, quick: None) -> None:
    wild = {**METHODS["teacher"], "grid": {"optimiser.lr": [1e-3, 1e30]}}
    student = {**METHODS["student"], "teacher": "teacher,lr=1e+30", "grid": {}}
    path = write_sweep(seeds=[0], teacher=wild, student=student)
    with pytest.raises(KarmmaError) as caught:
        launch(path)
    assert str(caught.value).startswith("1 failed: teacher,lr=1e+30/seed0 (sw/jobs/logs/")
    assert str(caught.value).endswith("not started because of them: report, student/seed0.")
    assert Path("sw/baseline/seed0/best").is_dir()
    status = run("sweep", str(path), "--status").output
    assert re.search(r"^teacher,lr=0.001 +1 of 1 run done$", status, re.MULTILINE)
    assert re.search(r"^teacher,lr=1e\+30 +0 of 1 .*ends with: Error: ", status, re.MULTILINE)
    assert re.search(r"^report +no report$", status, re.MULTILINE)
    alone = run("sweep", str(path), "--run", "student/seed0")
    assert alone.exit_code == 1
    assert "depends on runs that are not done: teacher,lr=1e+30/seed0" in alone.output


RIVALS = {
    "teacher": "train/teacher.yaml",
    "late_fusion": "train/late_fusion.yaml",
    "zero_imputation": "train/zero_imputation.yaml",
    "mean_imputation": "train/mean_imputation.yaml",
    "baseline": "train/baseline.yaml",
    "baseline_delta": "train/baseline_delta.yaml",
    "student": "train/student.yaml",
}


def shipped(name: str) -> tuple[LoadedSweep, list[Any], Any]:
    """A shipped sweep, the recipes of its runs, and that of its report."""
    path = Path("batch", name)
    assert path.read_text().startswith(f"# karmma sweep {path}")
    sweep = load_sweep(path)
    recipes: list[Any] = [stage.recipe for stage in sweep.stages]
    return sweep, [r for r in recipes if isinstance(r, TrainRecipe)], recipes[-1]


def test_the_shipped_sweep_chooses_on_one_subject_and_reports_the_test_subjects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    sweep, trained, report = shipped("utd_mhad.yaml")
    assert {recipe.val_split for recipe in trained} == {"val"}
    assert {recipe.select_by for recipe in trained} == {"action_top1"}
    assert (report.split, len(report.runs)) == ("test", 5 * len(sweep.points))
    extract = config.load(ExtractRecipe, Path("extract/utd_mhad.yaml"))
    assert report.stores == [extract.out / name for name in extract.sets]


@pytest.mark.parametrize(("name", "seeds"), [("utd_mhad", 5), ("epic_kitchens_100", 3)])
def test_a_shipped_sweep_of_all_methods_chooses_nothing_on_what_it_reports(
    monkeypatch: pytest.MonkeyPatch, name: str, seeds: int
) -> None:
    monkeypatch.chdir(ROOT)
    sweep, trained, report = shipped(f"{name}_rivals.yaml")
    assert {key: str(m.recipe) for key, m in sweep.settings.methods.items()} == RIVALS
    assert (report.split, {recipe.select_by for recipe in trained}) == ("val", {"epoch"})
    assert len(trained) == len(report.runs) == seeds * len(RIVALS)
    # Students and rivals differ in their method, not in their size or how long they learn.
    small = [recipe for recipe in trained if recipe.out.parent.name != "teacher"]
    assert len({(r.size.dim, r.size.layers, r.epochs, r.optimiser.lr) for r in small}) == 1
    assert all(recipe.standardise for recipe in trained) == (name == "utd_mhad")


def test_nothing_begins_where_a_store_is_missing(here: Path) -> None:
    result = run("sweep", str(write_sweep()))
    assert result.exit_code == 2
    assert "features/teacher does not exist" in result.output
    assert not Path("sw").exists()


def write_recording(clips: int = 24, lost: int = 0) -> None:
    """Write an extraction of one IMU into the current folder, and a sweep that begins with it."""
    seconds = np.arange(50 * clips) / 50
    table = np.column_stack([seconds, np.sin(seconds), np.cos(seconds)])
    np.savetxt("imu.csv", table, "%.4f", ",", header="t,a,b", comments="")
    rows = [
        f"c{i},{i},{i + 1},{'xy'[i % 2]},{'train' if i % 3 else 'val'},"
        f"{'gone' if i < lost else 'imu'}.csv"
        for i in range(clips)
    ]
    Path("m.csv").write_text("\n".join(["clip_id,start,stop,verb,split,imu", *rows]) + "\n")
    imu = {"channels": ["a", "b"], "time": "t", "rate_hz": 50, "windows": 4, "window": 5}
    tree: dict[str, Any] = {"manifest": "m.csv", "out": "features", "sensors": {"imu": imu}}
    tree |= {"sets": {"imu": {"imu": {"name": "windows"}}}, "store": {"clips_per_shard": 4}}
    Path("extract.yaml").write_text(yaml.safe_dump(tree))
    path = write_sweep(seeds=[0], teacher=None, student=None)
    sweep = {**yaml.safe_load(path.read_text()), "extract": "extract.yaml"}
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    Path("baseline.yaml").write_text(yaml.safe_dump({**TRAINED, "store": "features/imu"}))


@pytest.mark.slow
def test_a_sweep_extracts_first_and_goes_on_where_that_was_killed(
    here: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "DecodePool", HerePool)
    write_recording()

    def killed() -> None:
        kill_at_call(Path("features"), 10, "write */journal")  # the tenth clip, of the third shard
        launch(Path("sweep.yaml"))

    assert in_fork(killed) == -signal.SIGKILL
    status = run("sweep", "sweep.yaml", "--status").output
    assert re.search(r"^extract +2 of 6 shards$", status, re.MULTILINE), status
    assert launch(Path("sweep.yaml")) == ["extract", "baseline/seed0", "report"]
    assert launch(Path("sweep.yaml")) == []
    tokens = FeatureStore.open("features/imu").tokens("imu", "c7").reshape(4, 5, 2)
    moments = 7 + (np.arange(4) * 0.9 / 3)[:, None] + np.arange(5) / 50
    np.testing.assert_allclose(tokens[..., 0], np.sin(moments), atol=2e-2)


def test_nothing_is_trained_on_a_store_that_lost_too_much(
    here: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "DecodePool", HerePool)
    write_recording(lost=8)
    with pytest.raises(
        KarmmaError,
        match=r"1 failed: extract .*not started because of them: baseline/seed0, report",
    ):
        launch(Path("sweep.yaml"))
    with pytest.raises(TooManyFailuresError, match="8 of 24 clips lost a modality"):
        launch(Path("sweep.yaml"))
    assert "8 of 24 clips lost" in run("sweep", "sweep.yaml", "--run", "baseline/seed0").output
    assert "8 of 24 clips lost" in run("sweep", "sweep.yaml", "--status").output
    assert not Path("sw/baseline").exists()


def test_what_does_not_fit_the_extracted_store_is_told_before_anything_is_trained(
    here: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "DecodePool", HerePool)
    write_recording()
    tree = yaml.safe_load(Path("sweep.yaml").read_text())
    tree["evaluate"]["set"]["split"] = "tset"
    Path("sweep.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    fault = "report: features/imu: no clip is in split='tset'; its splits: train, val."
    with pytest.raises(
        KarmmaError, match=r"1 failed: extract .*not started .*: baseline/seed0, report"
    ):
        launch(Path("sweep.yaml"))
    assert fault in Path("sw/jobs/logs/extract.log").read_text()
    with pytest.raises(ConfigError, match=re.escape(f"nothing was started: {fault}")):
        launch(Path("sweep.yaml"))
    assert not Path("sw/baseline").exists()


def test_a_run_by_hand_has_the_threads_of_one_that_a_sweep_starts(
    stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run_one(load_sweep(write_sweep()), "baseline/seed0", StopFlag())
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert '"threads": 1,' in Path("sw/baseline/seed0/metrics.jsonl").read_text()


def test_slurm_is_handed_an_array_for_each_rank_of_dependence(
    stores: Path, slurm: FakeSlurm, quick: None
) -> None:
    path = write_sweep()
    run_one(load_sweep(path), "teacher/seed0", StopFlag())
    site = Path("site.yaml")
    site.write_text("karmma: karmma\naccount: proj\n")
    dry = run("sweep", str(path), "--site", str(site), "--dry-run", "--jobs", "8")
    assert dry.exit_code == 0
    assert slurm.jobs() == []
    text = re.sub(r"\.[0-9a-f]{6}$", ".DIGEST", dry.output, flags=re.MULTILINE)
    assert text.replace(str(stores), "/here") == (GOLDEN / "sweep.sbatch").read_text()
    assert run("sweep", str(path), "--slurm", "--site", str(site)).exit_code == 0
    after = [re.search(r"dependency=(\S+)", job) for job in slurm.jobs()]
    assert [match and match[1] for match in after] == [None, "afterany:101", "afterany:102"]
    again = run("sweep", str(path), "--slurm", "--site", str(site))
    assert "runs2: already queued as job 102" in again.output
    assert len(slurm.jobs()) == 3
    # the first array is lost: what waits for it would begin too early, and is sent off anew
    slurm.queue.write_text("".join(slurm.queue.read_text().splitlines(keepends=True)[1:]))
    run("sweep", str(path), "--slurm", "--site", str(site))
    assert [job.split()[0] for job in slurm.jobs()[3:]] == [
        *("sbatch", "scancel", "sbatch", "scancel", "sbatch")
    ]
    assert "runs1 in the queue: 1 pending" in run("sweep", str(path), "--status").output


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_to_the_same_bytes(stores: Path) -> None:
    student = {**METHODS["student"], "grid": {}, "set": {"epochs": 4, "save_every_s": 0}}
    teacher = {**METHODS["teacher"], "set": {"epochs": 4, "save_every_s": 0}}
    path = write_sweep(seeds=[0], teacher=teacher, student=student, baseline=None)
    words = [sys.executable, "-m", "karmma_pipeline.cli", "sweep", str(path), "--jobs", "1"]
    for folder, number in (("teacher", signal.SIGKILL), ("student", signal.SIGTERM)):
        with Path("said").open("w") as said:
            process = subprocess.Popen(words, stdout=said, stderr=said)
        wait_for(lambda f=folder: any(Path(f"sw/{f}/seed0/state").glob("*.pt")))  # type: ignore[misc]
        process.send_signal(number)
        code = process.wait(PATIENCE_S)
        assert code == (-9 if number == signal.SIGKILL else 75), Path("said").read_text()
    assert subprocess.run(words, check=False).returncode == 0
    killed = {name: results(Path(f"sw/{name}/seed0")) for name in ("teacher", "student")}
    path.write_text(path.read_text().replace("out: sw", "out: whole"))
    for name in ("teacher", "student"):
        run_one(load_sweep(path), f"{name}/seed0", StopFlag())
        assert results(Path(f"whole/{name}/seed0")) == killed[name]
    assert config.read(Path("whole/student/seed0/recipe.yaml"))["epochs"] == 4
