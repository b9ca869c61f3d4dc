from collections import Counter
from pathlib import Path

from karmma_pipeline.modalities import Reason, canonical, evaluated_subsets, label, subsets


def test_subsets_come_in_the_papers_order() -> None:
    labels = [label(s) for s in subsets(["audio", "rgb", "flow"])]
    assert labels == ["V+F+A", "V+F", "V+A", "F+A", "V", "F", "A"]


def test_unknown_modalities_sort_after_the_known_ones() -> None:
    assert canonical(["imu", "audio", "boxes", "rgb"]) == ("rgb", "audio", "boxes", "imu")
    assert label(["imu", "rgb"]) == "V+imu"
    assert len(subsets(["a", "b", "c", "d"])) == 15


def test_every_reason_tells_what_to_do() -> None:
    assert all(reason.hint for reason in Reason if reason is not Reason.PRESENT)


def test_the_table_of_reasons_in_the_documents_has_them_all() -> None:
    page = (Path(__file__).parent.parent / "docs" / "media.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[:2] for line in page.splitlines() if line.startswith("| ")]
    told = {name.strip("`"): int(code[2:]) for code, name, *_ in rows if code[2:].isdigit()}
    assert told == {r.name.lower(): r.value for r in Reason if r is not Reason.PRESENT}


def test_an_evaluation_never_passes_a_clip_more_than_60_times() -> None:
    for count, sizes in {
        3: {3: 1, 2: 3, 1: 3},
        6: {6: 1, 5: 6, 4: 15, 3: 20, 2: 15, 1: 6},
        7: {7: 1, 6: 7, 1: 7},
        29: {29: 1, 28: 29, 1: 29},
        30: {30: 1, 1: 30},
        58: {58: 1, 1: 58},
        59: {59: 1},
    }.items():
        chosen = evaluated_subsets(f"s{i:02d}" for i in range(count))
        assert Counter(map(len, chosen)) == sizes
        assert [len(s) for s in chosen] == sorted(map(len, chosen), reverse=True)
        assert count <= 6 or len(chosen) < 60


def test_many_modalities_have_short_labels() -> None:
    every = ["rgb", "audio", *(f"s{i}" for i in range(6))]
    assert label(every, every) == "all"
    assert label(every[1:], every) == "all but V"
    assert label(every[:2], every) == "V+A"
    assert label(every[:3], every[:3]) == "V+A+s0"
