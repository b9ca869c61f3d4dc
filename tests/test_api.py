"""The public API: README's snippet and every docstring's example, in a folder with a few clips."""

import ast
import doctest
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.tiny_store import write_store
from support.training import common

import karmma_pipeline as km
from karmma_pipeline import config, logs
from karmma_pipeline.cli import main
from karmma_pipeline.data.sample import write_sample
from karmma_pipeline.training.recipe import TeacherRecipe

ROOT = Path(__file__).parents[1]
FUNCTIONS = [n for n in km.__all__ if inspect.isfunction(getattr(km, n))]
ORDER = (
    "extract",
    "train_teacher",
    "train_baseline",
    "distill",
    "evaluate",
    "load_model",
    "predict",
    "FeatureStore",
    "TrainedModel",
    "Predictions",
    "Recognizer",
    "KarmmaError",
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder: the demo's clips and recipes, and no runs."""
    folder, before = tmp_path_factory.mktemp("project"), Path.cwd()
    os.chdir(folder)
    write_sample(Path("clips"), clips=12)
    arguments = ["init", "project", ".", "--manifest", "clips/manifest.csv", "--size", "tiny"]
    assert CliRunner().invoke(main, arguments, catch_exceptions=False).exit_code == 0
    yield folder
    os.chdir(before)


@pytest.mark.slow
def test_every_docstrings_example_prints_what_it_says(project: Path) -> None:
    for module in pkgutil.walk_packages(km.__path__, "karmma_pipeline."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert {*ORDER} == {*km.__all__} - {"__version__"}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for name in ORDER:
        thing = getattr(km, name)
        assert inspect.isfunction(thing) or inspect.isclass(thing), f"km.{name} is a module"
        test = doctest.DocTestParser().get_doctest(
            inspect.getdoc(thing) or "", {"km": km, "torch": torch}, name, None, 0
        )
        assert test.examples, f"km.{name}: its docstring has no example"
        printed: list[str] = []
        runner.run(test, out=printed.append)
        assert not printed, "".join(printed)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, typing; before = {*sys.modules}; import karmma_pipeline as km; "
        "names = dir(km); print(sorted({*sys.modules} - before)); print(names)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert ast.literal_eval(done[0]) == ["karmma_pipeline"]
    assert ast.literal_eval(done[1]) == sorted(km.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'exract'"):
        km.exract  # type: ignore[attr-defined]  # noqa: B018


USER = '''
from pathlib import Path
import karmma_pipeline as km

report = km.extract("extract.yaml")
clips: int = report.clips
km.train_teacher(Path("teacher.yaml"), epochs=2)
km.train_baseline({"store": "features/student", "out": "runs/b"}, progress=True)
run: Path = km.distill("student.yaml", epochs=20).run
names = [run.name for run in km.evaluate(runs=["runs/student"]).results.runs]
store = km.FeatureStore.open("features/student")
width: int = store.tokens("rgb", store.clip_ids[0]).shape[1]
model = km.load_model("runs/student")
heads: dict[str, tuple[str, ...]] = model.card.heads
preds: km.Predictions = km.predict(model, store, split="val", without=["audio"])
top1: float = preds.top1("verb")
table = preds.to_pandas()
try:
    km.predict("runs/student", "features/student")
except km.KarmmaError as error:
    print(error.exit_code)
'''  # fmt: skip


@pytest.mark.slow
def test_a_users_file_is_typed(tmp_path: Path) -> None:
    def mypy(text: str) -> str:
        path = tmp_path / "user.py"
        path.write_text(text)
        command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent",
                   "--config-file", os.devnull, "--cache-dir", str(ROOT / ".mypy_cache" / "user"),
                   str(path)]  # fmt: skip
        environment = {**os.environ, "MYPYPATH": str(ROOT)}
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
        ).stdout

    pytest.importorskip("mypy")
    assert mypy(USER).startswith("Success"), mypy(USER)
    wrong = mypy(USER.replace('"verb"', "3").replace("km.distill", "km.distil"))
    assert "arg-type" in wrong
    assert 'no attribute "distil"' in wrong


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store ``s`` and a teacher ``run`` that was trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    write_store(folder / "s", clips=48)
    km.train_teacher(common(folder / "s", folder / "run"), epochs=3)
    return folder


def test_a_recipe_is_a_path_a_dict_or_a_model(tmp_path: Path) -> None:
    tree = common(tmp_path / "s", tmp_path / "r")
    path = tmp_path / "r.yaml"
    made = config.resolve(TeacherRecipe, tree, {"epochs": 7, "optimiser__lr": 0.5})
    assert (made.epochs, made.optimiser.lr) == (7, 0.5)
    config.save(made, path)
    for source in (path, str(path), made):
        again = config.resolve(TeacherRecipe, source, {"size__dropout": 0.25})
        assert (again.epochs, again.optimiser.lr, again.size.dropout) == (7, 0.5, 0.25)
    with pytest.raises(km.KarmmaError, match=r"optimiser\.lrr: unknown key, did you mean 'lr'"):
        config.resolve(TeacherRecipe, tree, {"optimiser__lrr": 1})
    with pytest.raises(km.KarmmaError, match="give a path, a dict or a TeacherRecipe"):
        km.train_teacher(3)  # type: ignore[arg-type]


def test_predictions_are_those_of_the_network(trained: Path) -> None:
    store, model = km.FeatureStore.open(trained / "s"), km.load_model(str(trained / "run"))
    assert model.path == trained / "run/best"
    assert km.load_model(trained / "run/best").card == model.card
    preds = km.predict(model, store, split="val", without=["audio"])
    assert set(preds.clip_ids) == {
        i.decode() for i in store.clip_ids[store.split == "val"].tolist()
    }
    clip = preds.clip_ids[3]
    tokens = {m: torch.from_numpy(store.tokens(m, clip))[None] for m in ("rgb", "flow")}
    tokens["audio"] = torch.full((1, *store.shape("audio")), torch.nan)
    logits = model.network(tokens, torch.tensor([[True, True, False]]))["verb"]
    assert np.allclose(preds.logits["verb"][3], logits.detach().numpy(), atol=1e-5)
    right = [a == b for a, b in zip(preds.to_pandas()["verb"], preds.classes("verb"), strict=True)]
    assert preds.top1("verb") == pytest.approx(100 * sum(right) / len(right))
    both = preds.top1()
    assert both == preds.top1("action") <= min(preds.top1("verb"), preds.top1("noun"))


def test_a_clip_with_nothing_to_see_has_no_class_and_counts_as_wrong(trained: Path) -> None:
    preds = km.predict(trained / "run", trained / "s", without=["rgb", "flow"])
    silent = [not row.any() for row in preds.mask]
    assert any(silent)
    for head in ("verb", "noun"):
        assert [name is None for name in preds.classes(head)] == silent
    complete = km.predict(trained / "run", trained / "s", without=["rgb", "flow"])
    known = ~np.array(silent)
    right = complete.logits["noun"].argmax(axis=1) == complete.labels["noun"]
    assert preds.top1("noun") == pytest.approx(100 * (right & known).mean())


def test_classes_meet_by_name_and_foreign_tokens_are_refused(trained: Path, tmp_path: Path) -> None:
    verbs = ("v2", "vx", "v0")
    write_store(tmp_path / "other", clips=12, heads={"verb": verbs}, label=0)
    preds = km.predict(trained / "run", tmp_path / "other")
    assert preds.labels["verb"].tolist() == [2] * 12  # "v2" is the model's class 2
    assert preds.labels["noun"].tolist() == [-1] * 12
    with pytest.raises(km.KarmmaError, match="no clip has a label"):
        preds.top1("noun")
    write_store(tmp_path / "wide", clips=12, width=16)
    with pytest.raises(km.KarmmaError, match="come from a different backbone"):
        km.predict(trained / "run", tmp_path / "wide")
    for without, message in (
        (["sound"], "unknown modality"),
        (["rgb", "flow", "audio"], "leaves no modality"),
    ):
        with pytest.raises(km.KarmmaError, match=message):
            km.predict(trained / "run", trained / "s", without=without)


def test_results_show_themselves_in_a_notebook(tmp_path: Path, trained: Path) -> None:
    write_store(tmp_path / "s", clips=12, heads={"verb": ("<b>", "v1")}, label=0)
    page = km.predict(trained / "run", tmp_path / "s")._repr_html_()
    assert "<b>" not in page
    assert page.count("<tr>") == 11
    assert "2 more clips" in page
    report = km.evaluate(runs=[trained / "run"], out=tmp_path / "report", costs=False)
    assert "<table>" in report._repr_html_()
    assert config.read(tmp_path / "report/recipe.yaml")["stores"] == [str(trained / "s")]


def test_tokens_of_a_clip(trained: Path, tmp_path: Path) -> None:
    store = km.FeatureStore.open(str(trained / "s"))
    tokens = store.tokens("rgb", "c007")
    assert (tokens.dtype, tokens.shape) == (np.dtype("float32"), (3, 8))
    assert np.array_equal(tokens, store.tokens("rgb", store.clip_ids[7]))
    for modality, clip, message in (
        ("sound", "c007", "it has rgb, flow, audio"),
        ("rgb", "c999", "clip_id='c999' not found"),
        ("audio", "c000", "clip 'c000' has no audio"),
    ):
        with pytest.raises(km.KarmmaError, match=message):
            store.tokens(modality, clip)


def test_a_library_draws_bars_only_if_asked(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_bar_kind", [None])  # whatever a command before has set
    km.predict(trained / "run", trained / "s")
    assert capsys.readouterr().err == ""
    km.predict(trained / "run", trained / "s", progress=True)
    assert "predict: 100%" in capsys.readouterr().err
    km.predict(trained / "run", trained / "s")
    assert capsys.readouterr().err == ""
