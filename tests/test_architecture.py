"""The folders show the way the data flows; these tests keep it so."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import karmma_pipeline

PACKAGE = Path(karmma_pipeline.__file__).parent
FOUNDATION = {"config", "errors", "files", "jobs", "metrics", "modalities", "runs"}
ALLOWED = {
    "data": FOUNDATION | {"store"},
    "models": FOUNDATION,
    "store": FOUNDATION | {"data"},
    "extraction": FOUNDATION | {"data", "models", "store"},
    "training": FOUNDATION | {"data", "models", "store"},
    "evaluation": FOUNDATION | {"data", "models", "store"},
    "batch": FOUNDATION
    | {"data", "models", "store", "extraction", "training", "evaluation", "recipes"},
    **dict.fromkeys(FOUNDATION, FOUNDATION),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Parts of the package that a file imports, wherever in the file the import stands."""
    parts: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            base = node.module or ""
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        parts |= {n.split(".")[1] for n in names if n.startswith("karmma_pipeline.")}
    return parts - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_dependencies_run_one_way(path: Path) -> None:
    part = part_of(path)
    if part in ALLOWED:
        assert imported_parts(path) <= ALLOWED[part] | {part}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in {"utils", "helpers", "misc", "common"}


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys, karmma_pipeline.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'zarr', 'h5py'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_top_level_recipe_folders_hold_no_python() -> None:
    root = PACKAGE.parent
    parts = {"extract": "extraction", "train": "training", "evaluate": "evaluation"}
    for stage in ("extract", "train", "evaluate", "data", "batch"):
        folder = root / stage
        if folder.is_dir():
            assert not list(folder.rglob("*.py"))
            assert (
                f"the code is in karmma_pipeline/{parts.get(stage, stage)}/"
                in (folder / "README.md").read_text()
            )
