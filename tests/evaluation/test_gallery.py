"""The clips that a report shows are drawn by a seeded rule from what the run answered."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from karmma_pipeline.evaluation.gallery import Choice, choose

SUBSETS = [["rgb", "audio"], ["rgb"], ["audio"]]
CLIPS = 60


@pytest.fixture(scope="module")
def answers() -> dict[str, npt.NDArray[np.int64]]:
    """Return what is said of each clip by subset, of 3 classes; the truth is class 1.

    rgb is right most often alone, of clips that have it; the last ten have no label, and ten
    before them no rgb.
    """
    rng = np.random.default_rng(0)
    return {
        "rgb+audio": rng.choice(3, CLIPS, p=[0.2, 0.7, 0.1]),
        "rgb": rng.choice(3, CLIPS, p=[0.3, 0.5, 0.2]),
        "audio": rng.choice(3, CLIPS, p=[0.6, 0.2, 0.2]),
    }


@pytest.fixture(scope="module")
def logits(
    answers: dict[str, npt.NDArray[np.int64]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("gallery") / "0_net.safetensors"
    values = np.stack([np.eye(3, dtype=np.float32)[of] for of in answers.values()])
    labels = np.ones(CLIPS, np.int64)
    labels[50:] = -1
    present = np.ones((CLIPS, 2), np.uint8)
    present[40:50, 0] = 0
    ids = np.array([f"clip{n}".encode() for n in range(CLIPS)], "S10")
    save_file(
        {
            "logits.verb": values,
            "labels.verb": labels,
            "present": present,
            "clip_ids": ids.view(np.uint8).reshape(CLIPS, -1),
        },
        path,
        {"karmma": json.dumps({"name": "net", "subsets": SUBSETS})},
    )
    return path


def numbers(choice: Choice, kind: str) -> list[int]:
    return [int(one.clip_id.removeprefix("clip")) for one in choice.clips if one.kind == kind]


def test_each_kind_is_what_it_is_called(
    logits: Path, answers: dict[str, npt.NDArray[np.int64]]
) -> None:
    every, rgb = answers["rgb+audio"] == 1, answers["rgb"] == 1
    labelled, seen = np.arange(CLIPS) < 50, np.arange(CLIPS) < 40
    pools = {
        "correct": every & rgb & seen,
        "wrong": ~every & labelled,
        "rescued": every & ~rgb & seen,
    }
    all_of_them = choose(logits, CLIPS, seed=0)
    assert all_of_them.alone == "rgb"
    for kind, pool in pools.items():
        assert numbers(all_of_them, kind) == np.flatnonzero(pool).tolist()
        assert f"{pool.sum()} of {pool.sum()} {kind}" in all_of_them.rule
    for one in all_of_them.clips:
        row = int(one.clip_id.removeprefix("clip"))
        assert (one.best["verb"], one.alone["verb"]) == (
            answers["rgb+audio"][row],
            answers["rgb"][row],
        )


def test_the_same_seed_draws_the_same_and_the_rule_says_so(logits: Path) -> None:
    first, again, other = (choose(logits, 3, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.clips != other.clips
    for kind in ("correct", "wrong", "rescued"):
        assert len(set(numbers(first, kind))) == 3
    assert first.rule.startswith("net: 3 of ")
    assert first.rule.endswith(
        "sampled with seed 1; rescued: wrong with rgb alone, correct with all modalities"
    )
