"""The net itself: what differs is said, what may differ is not, and nothing else is left out."""

import json
from pathlib import Path

import numpy as np
import pytest
from equivalence.compare import compare
from equivalence.inputs import RECIPES
from equivalence.rules import RULES, without
from equivalence.work import HANDED, steps
from safetensors.numpy import save


def write(folder: Path, name: str, data: bytes | str) -> None:
    path = folder / "out" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def differences(tmp_path: Path, name: str, old: bytes | str, new: bytes | str) -> list[str]:
    write(tmp_path / "old", name, old)
    write(tmp_path / "new", name, new)
    return compare(tmp_path / "old", tmp_path / "new", "out")


def test_equal_folders_have_no_differences(tmp_path: Path) -> None:
    assert differences(tmp_path, "store/rgb/tokens/c/0/0", b"\0\1", b"\0\1") == []


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("store/c/0/0", b"\0" * 50 + b"\1", b"\0" * 51, "from byte 50"),
        ("store/spec.json", '{"a": {"b": [1, 2]}}', '{"a": {"b": [1, 3]}}', "a.b.1 was 2 and is 3"),
        ("run/recipe.yaml", "seed: 1\n", "sead: 1\n", "seed was 1"),
        ("store/spec.json", '{"a": 1}', '{"a":  1}', "order or spelling"),
        ("run/metrics.jsonl", '{"loss": 1.0}\n', '{"loss": 2.0}\n', "0.loss was 1.0 and is 2.0"),
        ("run/best/model.safetensors", save({"w": np.zeros(2, np.float32)}),
         save({"w": np.array([0, 0.5], np.float32)}), "tensor w differs by up to 0.5"),
    ],
)  # fmt: skip
def test_a_difference_is_named(
    tmp_path: Path, name: str, old: bytes | str, new: bytes | str, said: str
) -> None:
    (line,) = differences(tmp_path, name, old, new)
    assert line.startswith(f"out/{name}: ")
    assert said in line


def test_files_that_are_missing_or_new_are_named(tmp_path: Path) -> None:
    write(tmp_path / "old", "run/last/model.json", "{}")
    write(tmp_path / "new", "run/last.json", "{}")
    lines = compare(tmp_path / "old", tmp_path / "new", "out")
    assert lines == [
        "out/run/last and 1 in it: missing",
        "out/run/last.json: was not there before",
    ]


def test_what_is_measured_may_differ_and_what_is_counted_may_not(tmp_path: Path) -> None:
    old, new = ({"clips": 3, "seconds": {"decode wait": s}} for s in (1.0, 2.0))
    assert differences(tmp_path, "demo/extract.json", json.dumps(old), json.dumps(new)) == []
    (line,) = differences(tmp_path, "demo/extract.json", json.dumps(old), json.dumps({"clips": 4}))
    assert "clips was 3 and is 4" in line


def test_a_rule_for_kills_counts_only_where_something_was_killed(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    assert differences(tmp_path, "demo/media_notes/0.jsonl", '{"a": 1}', '{"a": 1}\n{"a": 1}')
    assert compare(old, new, "out", killed=True) == []


def test_keys_are_left_out_wherever_a_star_stands() -> None:
    tree = {"runs": [{"at": 1, "n": 2}, {"at": 3, "n": 4}]}
    left = json.loads(without("runs.*.at")(json.dumps(tree).encode()))
    assert left == {"runs": [{"n": 2}, {"n": 4}]}


def test_every_rule_says_why_and_every_step_can_be_done() -> None:
    assert all(rule.why for rule in RULES)
    made: set[str] = set()
    for step in steps(real=True):
        assert made >= set(step.reads)
        made.add(step.writes)
    named = {word for step in steps(real=True) for command in step.commands for word in command}
    assert {f"recipes/{name}.yaml" for name in RECIPES} <= named
    assert set(HANDED) <= {step.name for step in steps(real=False)}
