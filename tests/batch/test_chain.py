"""Chains: what waits for what, how far stages are, and what is checked before the queue."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from batch.conftest import RECIPES, extract_recipe, write_chain
from support.tiny_store import write_store
from support.training import SIZE, teacher_recipe

from karmma_pipeline import config
from karmma_pipeline.batch.chain import load_chain
from karmma_pipeline.batch.checks import check
from karmma_pipeline.batch.launch import submit
from karmma_pipeline.batch.progress import stage_progress
from karmma_pipeline.batch.recipe import Chain, Site
from karmma_pipeline.errors import ConfigError, StoreError, TooManyFailuresError
from karmma_pipeline.evaluation.evaluate import evaluate
from karmma_pipeline.evaluation.recipe import EvaluateRecipe
from karmma_pipeline.extraction import progress
from karmma_pipeline.extraction.tables import count_failed
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store import Catalog, ShardWriter
from karmma_pipeline.training.recipe import DistillRecipe, TeacherRecipe
from karmma_pipeline.training.stages import distill, train_teacher

ROOT = Path(__file__).parents[2]


def test_stages_wait_for_those_whose_folders_they_read(here: Path) -> None:
    _, stages = load_chain(write_chain())
    assert {stage.name: stage.waits for stage in stages} == {
        "extract": (),
        "teacher": ("extract",),
        "student": ("extract", "teacher"),
        "report": ("extract", "teacher", "student"),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None, "later": {"command": "train-teacher", "recipe": "teacher.yaml"}}, ""),
        ({"twin": {"command": "train-teacher", "recipe": "teacher.yaml"}}, "same folder"),
        ({"x": {"command": "extract", "recipe": "e", "nodes": 2}}, "nodes=2: extract runs on one"),
        ({"x": {"command": "distill", "recipe": "e", "array": 2}}, "array=2: only extract"),
        ({"a/b": {"command": "distill", "recipe": "e"}}, "use 1 to 40"),
        ({"x": {"command": "distil", "recipe": "e"}}, "stages.x.command='distil'"),
    ],
)
def test_a_wrong_chain_is_refused(changes: dict[str, Any], message: str, here: Path) -> None:
    message = message or "student reads the output of later; put later before it"
    with pytest.raises(ConfigError, match=message):
        load_chain(write_chain(**changes))


def extraction(here: Path) -> list[Path]:
    """Two stores of three shards where the extraction would have put them."""
    (here / "features").mkdir()
    config.save(extract_recipe(), here / "features/recipe.yaml")
    return [write_store(here / "features" / name) for name in ("teacher", "student")]


def lose(store: Path, shard: int) -> None:
    (store / f"commit/{shard:06d}.safetensors").unlink()
    (store / "manifest.json").unlink()


def test_progress_is_what_lies_on_disk(here: Path) -> None:
    _, stages = load_chain(write_chain())
    extract, teacher, _, report = stages
    assert [p.index for p in stage_progress(extract).missing] == [0, 1, 2]
    stores = extraction(here)
    assert stage_progress(extract).done
    assert stage_progress(extract).text == "3 of 3 shards"
    lose(stores[1], 1)
    found = stage_progress(extract)
    assert (found.done, found.text) == (False, "2 of 3 shards")
    costs = progress.shard_seconds(Catalog(stores[0]))
    assert [part.shards(costs) for part in found.missing] == [[1]]
    assert stage_progress(teacher).text == "epoch 0 of 2"
    assert not stage_progress(report).done


def test_a_training_is_done_when_its_last_epoch_and_weights_are_there(here: Path) -> None:
    teacher = load_chain(write_chain())[1][1]
    run = here / "runs/teacher"
    for name in ("best", "last"):
        (run / name).mkdir(parents=True)
        (run / name / "model.safetensors").write_bytes(b"x")
    (run / "metrics.jsonl").write_text('{"epoch": 1, "val_action_top1": 5}\n{"ep')
    assert not stage_progress(teacher).done
    (run / "metrics.jsonl").write_text(
        '{"epoch": 1, "val_action_top1": 5}\n{"epoch": 2, "val_action_top1": 5}\n'
    )
    assert stage_progress(teacher).done
    (run / "last/model.safetensors").unlink()
    assert not stage_progress(teacher).done


def test_a_report_of_other_models_is_made_again(here: Path) -> None:
    report = load_chain(write_chain())[1][3]
    digests = []
    for name in ("teacher", "student"):
        weights = here / "runs" / name / "best/model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.write_bytes(name.encode())
        digest = hashlib.sha256(name.encode()).hexdigest()
        digests.append({"model_digest": digest, "store_digest": "of a store that is gone"})
    config.save(report.recipe, here / "report/recipe.yaml")
    (here / "report/results.json").write_text(json.dumps({"runs": digests}))
    (here / "report/index.html").write_text("x")
    assert stage_progress(report).done
    weights.write_bytes(b"trained again")
    assert stage_progress(report).text == "report written, changed since: runs/student"
    assert not stage_progress(report).done
    fewer = replace(report, recipe=report.recipe.model_copy(update={"draws": 3}))
    assert stage_progress(fewer).text == "report written, changed since: draws"


@pytest.mark.slow
def test_what_was_made_from_something_else_is_not_done(here: Path) -> None:
    """The chain's recipes as they are now, against a chain that ran to its end before."""
    chain = write_chain(array=1)
    features = extraction(here)
    for name, tree in RECIPES.items():
        if name in {"teacher", "student"}:
            tree = {**tree, "size": SIZE, "epochs": 1}
        Path(f"{name}.yaml").write_text(json.dumps(tree))
    _, stages = load_chain(chain)
    train_teacher(cast("TeacherRecipe", stages[1].recipe))
    distill(cast("DistillRecipe", stages[2].recipe))
    evaluate(cast("EvaluateRecipe", stages[3].recipe))
    assert [stage_progress(stage).changed for stage in stages] == [()] * 4
    assert all(stage_progress(stage).done for stage in stages)

    def said(name: str) -> str:
        _, stages = load_chain(chain)
        progress = next(stage_progress(stage) for stage in stages if stage.name == name)
        assert not progress.done
        return progress.text

    teacher = json.loads(Path("teacher.yaml").read_text())
    Path("teacher.yaml").write_text(json.dumps({**teacher, "optimiser": {"lr": 0.5}}))
    assert said("teacher") == "epoch 1 of 1, changed since: optimiser.lr"
    assert "runs/teacher contains a run of a different recipe; changed: optimiser.lr" in faults(
        chain
    )
    Path("teacher.yaml").write_text(json.dumps(teacher))
    other = {**RECIPES["extract"], "precision": "bfloat16", "max_failures": 0.5}
    Path("extract.yaml").write_text(json.dumps(other))
    assert said("extract") == "3 of 3 shards, changed since: precision"
    Path("extract.yaml").write_text(json.dumps(RECIPES["extract"]))
    for store in features:
        shutil.rmtree(store)
        write_store(store, seed=1)
    assert said("teacher") == "epoch 1 of 1, changed since: features/teacher"
    assert said("report") == "report written, changed since: runs/teacher, runs/student"
    shutil.rmtree("features")  # to free the disk: nobody knows any better
    assert stage_progress(stages[1]).done
    train_teacher(teacher_recipe(write_store(here / "s"), here / "again", epochs=1))
    shutil.rmtree("runs/teacher")
    Path("again").rename("runs/teacher")
    assert said("student") == "epoch 1 of 1, changed since: runs/teacher"


def test_finalize_names_the_command_for_what_is_missing(here: Path) -> None:
    stores = extraction(here)
    for count, command in ((3, "karmma extract features/recipe.yaml --part "), (1, "recipe.yaml`")):
        for store in stores:
            (store / "manifest.json").unlink(missing_ok=True)
        (stores[0] / "commit/000001.safetensors").unlink(missing_ok=True)
        with pytest.raises(StoreError, match=rf"1 shard missing \(1\); run `.*{command}"):
            progress.finish(extract_recipe(), count)
    (stores[1] / "commit/000002.safetensors").unlink()
    message = "sbatch --array=.*,.* --export=ALL,KARMMA_PARTS=3 extract/slurm.sbatch features"
    with pytest.raises(StoreError, match=message):
        progress.finish(extract_recipe(), 3)


def test_finalize_is_idempotent_and_judges_the_failures(here: Path) -> None:
    extraction(here)
    strict = extract_recipe().model_copy(update={"max_failures": 0.0})
    before = {p: p.stat().st_mtime_ns for p in here.rglob("*") if p.is_file()}
    assert progress.finish(strict) == 0  # clips without sound are no failures
    for path, when in before.items():
        assert path.stat().st_mtime_ns == when
    table = here / "features/failures.csv"
    table.write_text(table.read_text() + f"c1,rgb,decode,{Reason.CRASHED.name.lower()},\n")
    assert count_failed(strict.out) == 1
    with pytest.raises(TooManyFailuresError, match="1 of 96"):
        progress.check_failures(strict, 1, 96)


def test_durations_balance_and_unknown_ones_count_as_middling(here: Path) -> None:
    from karmma_pipeline.store import ClipRow, ModalitySpec, StoreSpec, create_store

    spec = StoreSpec(
        modalities={"rgb": ModalitySpec(tokens=1, width=1)}, heads={}, clips_per_shard=2
    )
    ends = [4.0, 6.0, float("nan"), 2.0, 9.0]
    rows = [ClipRow(f"c{i}", {}, "", "", 1.0, end) for i, end in enumerate(ends)]
    create_store(here / "s", spec, rows)
    assert progress.shard_seconds(Catalog(here / "s")) == [3 + 5, 4 + 1, 8]


def faults(path: Path) -> str:
    chain, stages = load_chain(path)
    with pytest.raises(ConfigError, match="nothing was started") as error:
        check(stages, [stage_progress(stage) for stage in stages], chain.folder)
    return str(error.value)


def test_what_will_be_missing_is_told_before_the_queue(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(here / "torch"))
    chain = write_chain(extract=None)
    assert (
        "teacher, student, report: features/teacher does not exist, and no stage of the chain "
        "writes it" in faults(chain)
    )
    chain = write_chain()
    published = {"audio": {"name": "resnet18", "weights": "DEFAULT", "image": [32, 32]}}
    own = {"audio": {"name": "resnet18", "weights": "my/w.pt", "image": [32, 32]}}
    tree = {**RECIPES["extract"], "sets": {"teacher": published, "student": own}}
    Path("extract.yaml").write_text(json.dumps(tree))
    (here / "clips/m.csv").write_text("clip_id\na\n")
    config.save(
        config.build(TeacherRecipe, {**RECIPES["teacher"], "epochs": 9}, ""),
        here / "runs/teacher/recipe.yaml",
    )
    told = faults(chain)
    assert "clips/m.csv: no column video" in told
    assert "karmma backbones fetch resnet18 DEFAULT" in told
    assert str(here / "torch") in told
    assert "weights='my/w.pt': no such file" in told
    assert "runs/teacher contains a run of a different recipe" in told
    (here / "report").write_text("a file")
    assert "report cannot be written" in faults(chain)


def test_too_many_failures_stop_the_chain(here: Path) -> None:
    extraction(here)
    rows = "".join(f"c{i},rgb,decode,crashed,\n" for i in range(20))
    (here / "features/failures.csv").write_text("clip_id,modality,stage,reason,hint\n" + rows)
    with pytest.raises(TooManyFailuresError, match=r"failures\.csv: 20 of 96"):
        submit(write_chain(), Site(), print)


def test_the_shipped_chain_and_site_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = Path("batch/epic_kitchens_100.yaml")
    _, stages = load_chain(path)
    assert [stage.waits for stage in stages if stage.name == "student"] == [("extract", "teacher")]
    config.load(Site, Path("batch/site.yaml"))
    assert config.load(Chain, path).stages["extract"].array == 64
    for file in ("batch/epic_kitchens_100.yaml", "batch/site.yaml"):
        assert Path(file).read_text().startswith("# karmma submit ")
        assert file in Path(file).read_text().splitlines()[0]


def test_a_writer_of_a_dead_job_gives_up_its_lock(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from karmma_pipeline.batch.slurm import release_locks

    store = extraction(here)[0]
    lose(store, 1)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    with ShardWriter(store, 1):
        lock = store / "spool/000001/lock"
        release_locks([store], {"41"})
        assert lock.is_file()
        release_locks([store], {"42"})
        assert not lock.exists()
