from pathlib import Path

from karmma_pipeline.modalities import Reason, canonical, label, subsets


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
