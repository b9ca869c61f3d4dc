"""What a newcomer runs: one command from nothing to a report; run again, nothing is done twice."""

import csv
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from karmma_pipeline.cli import main


@pytest.mark.slow
def test_the_quick_demo_ends_in_a_report_and_is_not_repeated(tmp_path: Path) -> None:
    words = ["demo", str(tmp_path), "--quick", "--end-to-end"]
    first = CliRunner().invoke(main, words, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    results = json.loads((tmp_path / "report/results.json").read_text())
    assert [run["name"] for run in results["runs"]] == [
        "Teacher",
        "Baseline",
        "Baseline w/ δ",
        "Student (distilled)",
        "Student, end to end (distilled)",
    ]
    assert len(results["runs"][0]["subsets"]) == 2 * 7
    assert results["data"]["split"] == "test"
    assert results["data"]["clips"] == 32
    page = (tmp_path / "report/index.html").read_text()
    assert "not pretrained" not in page
    assert "<svg" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//|url\(\s*["']?http""", page)
    with (tmp_path / "report/tables/drop_curve.csv").open() as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows[1:]] == [*(f"{p}%" for p in range(0, 100, 10)), "mean"]
    for name in ("drop_curve", "subsets", "costs"):
        assert (tmp_path / f"report/figures/{name}.png").stat().st_size > 10_000
    commands = [line for line in first.output.splitlines() if line.startswith("$ karmma")]
    assert len(commands) == 3
    assert all(f"{tmp_path}" in command for command in commands)

    def files() -> dict[Path, int]:
        kept = (p for p in tmp_path.rglob("*") if p.is_file() and "report" not in p.parts)
        return {p: p.stat().st_mtime_ns for p in kept if p.suffix in {".mp4", ".safetensors"}}

    before = files()
    second = CliRunner().invoke(main, words, catch_exceptions=False)
    assert second.exit_code == 0
    assert "6 of 6 stages done" in second.output
    assert files() == before
