"""Settings that cannot be used are refused before the first pass, and leave nothing."""

import re
from pathlib import Path
from typing import Any, NoReturn

import pytest
from support.any_store import fill_store
from support.evaluation import make_recipe, save_run, write_two_runs
from support.tiny_store import write_store

from karmma_pipeline.errors import KarmmaError
from karmma_pipeline.evaluation.evaluate import evaluate


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preconditions")
    write_two_runs(root, clips=12)
    for name, text in {
        "columns.csv": "clip,missing\nc000,rgb\n",
        "modality.csv": "clip_id,missing\nc000,sound\n",
        "clip.csv": "clip_id,missing\nc000,rgb\nelsewhere,rgb\n",
        "epoch.csv": "clip_id,missing,epoch\nc000,rgb,2\n",
        "class.csv": "verb\nno such verb\n",
    }.items():
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> NoReturn:
        pytest.fail("a pass was computed")

    monkeypatch.setattr("karmma_pipeline.evaluation.predict.predict_masked", fail)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.csv", "robustness.patterns='{}': [Errno 2]"),
        ("columns.csv", "{}: has no column 'clip_id'; it has ['clip', 'missing']"),
        (
            "modality.csv",
            "{}, line 2: missing='sound' is not a modality; the store has rgb, flow, audio",
        ),
        ("clip.csv", "{}, line 3: "),
        ("epoch.csv", "{}: epoch=2: an evaluation has no epochs"),
    ],
)
def test_a_list_of_patterns(place: Path, name: str, message: str) -> None:
    path = place / name
    refused(place, message.format(path), robustness={"patterns": {"mine": str(path)}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"submission": {}},
            "submission: the store has the heads and classes {'noun': 3, 'verb': 4}",
        ),
        ({"groups": {"unseen": "nowhere.csv"}}, "nowhere.csv: the list cannot be read"),
        ({"groups": {"tail": {"tool": "class.csv"}}}, "groups.tail: head 'tool' is unknown"),
        ({"groups": {"tail": {"verb": "class.csv"}}}, "'no such verb' is neither a class id nor"),
        ({"exclude": "nowhere.txt"}, "exclude='nowhere.txt': cannot be read"),
        ({"out": "store/report"}, "is inside the feature store {}"),
        ({"split": "tset"}, "no clip is in split='tset'"),
        ({"runs": ["run0", "other"], "stores": ["store", "others"]}, "differ in clips"),
    ],
)
def test_what_does_not_fit_the_clips(
    place: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(place)
    if "runs" in changes and not Path("others").exists():
        save_run(Path("other"), write_store(Path("others"), clips=9), name="Other")
    refused(place, message.replace("{}", str(place / "store")), **changes)


def test_patterns_of_more_modalities_than_all_subsets_are_evaluated_of(tmp_path: Path) -> None:
    store = fill_store(tmp_path / "store", modalities={f"m{i}": (1, 2) for i in range(7)})
    save_run(tmp_path / "run0", store, name="r")
    tests = {"patterns": {"mine": "mine.csv"}}
    message = f"up to 6 modalities; {store} has 7"
    refused(tmp_path, message, runs=[str(tmp_path / "run0")], robustness=tests)


def refused(place: Path, message: str, **changes: Any) -> None:
    """See that an evaluation is refused in one sentence, and leaves nothing."""
    recipe = make_recipe(place, **{"out": str(place / "report"), **changes})
    with pytest.raises(KarmmaError, match=re.escape(message)) as caught:
        evaluate(recipe)
    assert "\n" not in str(caught.value)
    assert not (place / "report").exists()
